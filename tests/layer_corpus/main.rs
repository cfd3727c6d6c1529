//! One small image for each rule of how layers become a tree, with the tree written out.
//!
//! What kiln builds is read back by two readers that nobody here wrote, and compared entry by entry with the expected tree:
//!
//! | | `fsck.erofs` | the kernel's driver | umoci, of the same layers |
//! |---|---|---|---|
//! | names, kinds, content, link targets, device numbers | yes | yes | yes |
//! | owners, times to the nanosecond | yes | yes | yes, but times of folders without an entry |
//! | permission bits | yes | yes | yes |
//! | setuid and setgid | of folders | yes | yes |
//! | hard links: which names are one file, number of names | no | yes | yes |
//! | extended attributes | no | yes | yes |
//!
//! `umoci` extracts the same layers by itself, as root. Where it cannot or does something else, the case says why; the test
//! checks that this is so, and counts. Without loop mounts nobody looks at what `fsck.erofs` does not show, and the test says so.

#[path = "../image_support/mod.rs"]
mod image_support;

mod case;
mod cases;
mod compare;
mod hostile;

use std::fmt;
use std::fmt::Write;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use case::Case;
use case::Second;
use compare::By;
use image_support::LayerBlob;
use image_support::Layout;
use image_support::Listing;
use image_support::Mounted;
use image_support::Place;
use image_support::extract;
use image_support::list;

/// So many cases there are, and so many of them umoci extracts to the same tree. Both only ever grow.
const CASES: usize = 291;
const COMPARED: usize = 279;

/// So many layers there are that have to be refused.
const HOSTILE: usize = 127;

/// Runs `check` on every case, on two threads, and reports all failures.
fn for_each_case(cases: &[Case], check: impl Fn(&Case) -> Result<(), String> + Sync) {
    let check_one = |case: &Case| {
        let checked = catch_unwind(AssertUnwindSafe(|| check(case)));
        checked.unwrap_or_else(|panic| Err(panic.downcast_ref::<String>().cloned().unwrap_or_default()))
    };
    let failures = |cases: &[Case]| -> Vec<String> {
        let failed = |case: &Case| check_one(case).err().map(|error| format!("{}: {error}", case.title()));
        cases.iter().filter_map(failed).collect()
    };
    let (first, second) = cases.split_at(cases.len() / 2);
    let failures = std::thread::scope(|scope| {
        let first = scope.spawn(|| failures(first));
        let second = failures(second);
        [first.join().expect("panics are caught"), second].concat()
    });
    assert!(failures.is_empty(), "{} cases failed\n{}", failures.len(), failures.join("\n"));
}

/// What two readers find in the image that kiln builds of the case's layers. The second may not be possible here.
fn built(case: &Case) -> Result<(Listing, Option<Listing>), String> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (_place, root) = runtime.block_on(async {
        let place = Place::new().await;
        let root = place.build(&case.layers).await;
        (place, root)
    });
    let root = root.map_err(|error| format!("kiln: {error:?}"))?;
    let (_folder, extracted) = extract(&root.path);
    Ok((extracted, Mounted::new(&root.path).map(|mounted| list(mounted.path()))))
}

#[test]
fn kiln_builds_the_tree_that_is_meant() {
    let cases = cases::all();
    let by_kernel = AtomicUsize::new(0);
    for_each_case(&cases, |case| {
        let (extracted, mounted) = built(case)?;
        compare::check(case, &extracted, By::Fsck)?;
        let Some(mounted) = mounted else { return Ok(()) };
        by_kernel.fetch_add(1, Ordering::Relaxed);
        compare::check(case, &mounted, By::Kernel)
    });
    print(format_args!(
        "{} cases, {} of them read by the kernel's driver as well",
        cases.len(),
        by_kernel.into_inner()
    ));
    assert_eq!(cases.len(), CASES, "the number of cases");
}

#[test]
fn umoci_extracts_the_same_tree() {
    let cases = cases::all();
    let compared = |case: &&Case| !matches!(case.second, Second::Differs(_) | Second::Cannot(_));
    report(&cases);
    for_each_case(&cases, |case| {
        let found = by_umoci(&case.layers)?;
        match (case.second, found) {
            (Second::Same, Ok(found)) => compare::check(case, &found, By::Umoci),
            (Second::Same, Err(error)) => Err(error),
            // The reasons have to stay true.
            (Second::SameRepacked(_), Err(_)) => compare::check(case, &by_umoci(&case.repacked())??, By::Umoci),
            (Second::Differs(_), Ok(found)) if compare::check(case, &found, By::Umoci).is_err() => Ok(()),
            (Second::Cannot(_), Err(_)) => Ok(()),
            (second, _) => Err(format!("no longer so: {second:?}")),
        }
    });
    assert_eq!(cases.iter().filter(compared).count(), COMPARED, "the number of cases that are compared");
}

/// What umoci makes of `layers`, or what it says is wrong with them.
fn by_umoci(layers: &[LayerBlob]) -> Result<Result<Listing, String>, String> {
    let layout = Layout::of(layers);
    let scratch = compare::scratch_with_xattrs();
    let bundle = scratch.path().join("bundle");
    let image = format!("{}:latest", layout.folder.path().display());
    let output = Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle).output();
    let output = output.map_err(|error| format!("umoci is needed by this test and cannot be run: {error}"))?;
    if output.status.success() {
        return Ok(Ok(list(&bundle.join("rootfs"))));
    }
    Ok(Err(String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[allow(clippy::print_stderr, reason = "what is not compared must be seen, not passed over")]
fn print(message: fmt::Arguments<'_>) {
    eprintln!("{message}");
}

fn report(cases: &[Case]) {
    let mut lines = String::new();
    let mut counts = [0; 4];
    for case in cases {
        let (index, line) = match case.second {
            Second::Same => (0, None),
            Second::SameRepacked(why) => (1, Some(("compared after repacking", why))),
            Second::Differs(why) => (2, Some(("umoci differs", why))),
            Second::Cannot(why) => (3, Some(("umoci cannot", why))),
        };
        counts[index] += 1;
        if let Some((what, why)) = line {
            writeln!(lines, "  {}: {what}: {why}", case.title()).expect("to memory");
        }
    }
    let [same, repacked, differs, cannot] = counts;
    print(format_args!(
        "{} cases: {same} compared with umoci, {repacked} after repacking, {differs} differ, {cannot} cannot be\n{lines}",
        cases.len()
    ));
}
