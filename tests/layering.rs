//! The architecture as a table: a module under `src/` may name the modules listed for it and no others.
//!
//! The compiler keeps the borders of crates; inside this one nothing else does. A change to the table belongs
//! in the same commit as the code that needs it, with the reason.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

/// A top-level module, and the modules that it may name.
const LAYERS: &[(&str, &[&str])] = &[
    ("units", &[]),
    // Tokio's pool of threads that may block, with panics passed on: for whoever does such work.
    ("blocking", &[]),
    ("block", &["units"]),
    ("mem", &["units"]),
    ("transport", &["units"]),
    ("hv", &["units", "mem"]),
    // Which engine this host can run guests on: tries a machine of one, through the seam.
    ("engine", &["units", "mem", "hv"]),
    ("vmm", &["units", "blocking", "block", "mem", "transport", "hv"]),
    ("image", &["units", "blocking"]),
    ("rootfs", &["units", "block", "image"]),
    ("snapshot", &["units", "block", "mem", "hv", "vmm"]),
    ("exec", &["units", "transport"]),
    ("files", &["units", "transport", "exec"]),
    ("tcp", &["units", "transport", "exec"]),
    ("workload", &["units", "transport", "exec"]),
    (
        "vm",
        &[
            "units",
            "blocking",
            "block",
            "mem",
            "transport",
            "hv",
            "engine",
            "vmm",
            "image",
            "rootfs",
            "snapshot",
            "exec",
            "files",
            "tcp",
            "workload",
        ],
    ),
    // Looks at a host before there is a VM, and names what a VM would look for: kernel and agent.
    ("doctor", &["blocking", "mem", "engine", "vm"]),
    // Many VMs of one image; what a VM is made of is none of its business.
    ("pool", &["image", "vm"]),
    // The umbrella over the operations' errors.
    ("error", &["image", "rootfs", "vmm", "snapshot", "exec", "files", "workload", "vm", "pool"]),
];

#[test]
fn modules_only_look_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in rust_files(&src) {
        let relative = file.strip_prefix(&src).expect("the walk started there");
        let module = relative.iter().next().and_then(|name| name.to_str()).expect("file names are UTF-8");
        let module = module.trim_end_matches(".rs");
        // The root declares and re-exports everything; that is all it does.
        if module == "lib" {
            continue;
        }
        seen += 1;
        let source = fs::read_to_string(&file).expect("source files are readable");
        wrong
            .extend(violations(module, &source).map(|(line, why)| format!("src/{}:{line}: {why}", relative.display())));
    }
    assert!(seen > 0, "found no modules to check");
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    for (index, (module, may_see)) in LAYERS.iter().enumerate() {
        for seen in *may_see {
            let position = LAYERS.iter().position(|(other, _)| other == seen);
            assert!(position.is_some_and(|position| position < index), "`{module}` looks up to `{seen}`");
        }
    }
}

#[test]
fn upward_hidden_and_unknown_paths_are_found() {
    let found = |module, source| violations(module, source).count();
    assert_eq!(found("mem", "use crate::units::Bytes;\nuse crate::mem::GuestRam;\n"), 0);
    assert_eq!(found("mem", "// crate::hv knows more\n/// [`crate::hv::Exit`]\n"), 0);
    assert_eq!(found("mem", "use crate::hv::Exit;"), 1);
    assert_eq!(found("mem", "fn f() -> crate::hv::Exit { crate::vmm::f() }"), 2);
    assert_eq!(found("mem", "use crate::{hv, vmm};"), 1);
    assert_eq!(found("mem", "use crate::*;"), 1);
    assert_eq!(found("mem", "use crate::Vm;"), 1);
    assert_eq!(found("novel", "use crate::units::Bytes;"), 1);
    assert_eq!(found("vm", "use my_crate::hidden::Thing;"), 0);
}

/// The lines of `source` that break the rules of `module`, with the reason.
fn violations<'a>(module: &'a str, source: &'a str) -> impl Iterator<Item = (usize, String)> + 'a {
    let layer = LAYERS.iter().find(|(name, _)| *name == module).map(|(_, may_see)| *may_see);
    source.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")).flat_map(
        move |(index, line)| crate_paths(line).filter_map(move |path| Some((index + 1, verdict(module, layer, path)?))),
    )
}

fn verdict(module: &str, layer: Option<&[&str]>, path: &str) -> Option<String> {
    let Some(may_see) = layer else {
        return Some(format!("`{module}` is not in the table of layers"));
    };
    let end = path.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(path.len());
    let named = &path[..end];
    if !LAYERS.iter().any(|(name, _)| *name == named) {
        // A braced import, a glob or a re-export of the root hides which module is meant.
        return Some(format!("`crate::{path}`: start the path with one module, one import a line"));
    }
    (named != module && !may_see.contains(&named)).then(|| format!("`{module}` may not name `{named}`"))
}

/// What follows each `crate::` that is a path's root.
fn crate_paths(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("crate::").filter_map(move |(at, root)| {
        let inside_a_name = line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        (!inside_a_name).then(|| &line[at + root.len()..])
    })
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).expect("source folders are readable") {
        let path = entry.expect("source folders are readable").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}
