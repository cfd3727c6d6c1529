//! The command line, in libtest's style.

/// What to run.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Parts of names; no filter is every case.
    filters: Vec<String>,
    /// The only engine to run on.
    pub(crate) engine: Option<String>,
    /// Only name the cases.
    pub(crate) list: bool,
    exact: bool,
}

impl Options {
    /// Whether the case is wanted.
    pub(crate) fn wants(&self, case: &str) -> bool {
        let matches = |filter: &String| if self.exact { case == filter } else { case.contains(filter.as_str()) };
        self.filters.is_empty() || self.filters.iter().any(matches)
    }
}

/// Reads the arguments. What `cargo test` hands to every test program and means nothing here is accepted.
pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--engine" => options.engine = Some(arguments.next().ok_or("--engine needs a name")?),
            "--list" => options.list = true,
            "--exact" => options.exact = true,
            "--nocapture" | "--no-capture" | "--show-output" | "--quiet" | "-q" => {}
            "--color" | "--format" | "--test-threads" => drop(arguments.next()),
            other if other.starts_with("--color=") || other.starts_with("--test-threads=") => {}
            other if other.starts_with('-') => return Err(format!("unknown argument {other}")),
            filter => options.filters.push(filter.to_owned()),
        }
    }
    Ok(options)
}
