//! A program that nobody here wrote, pulled from a registry that nobody here wrote: Debian's `python3` computes
//! in the guest, and has to print what the same interpreter prints on this machine's own processor.

#[path = "support/debian.rs"]
mod debian;
#[path = "support/guest.rs"]
mod guest;
mod image_support;
#[path = "support/python.rs"]
mod python;

use guest::config;
use guest::show;
use image_support::Place;
use image_support::registry::Registry;
use kiln::Image;
use kiln::Vm;
use kiln::units::Bytes;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWriteExt;

const INSTALLED: &str = include_str!("support/installed.py");
const MODULES: &str = "modules 305 missing _gdbm _msi _overlapped _scproxy _tkinter _winapi ensurepip idlelib lib2to3 \
                       msilib msvcrt nis nt tkinter turtle turtledemo winreg winsound";
const PROGRAM: &str = include_str!("support/compute.py");

/// Boots the image after a round through the registry.
async fn boot(python: &python::PythonImage) -> Vm {
    let registry = Registry::open();
    registry.push(&python.layout(), "latest", "debian/python:3.11", &[]);
    let place = Place::new().await;
    let image = Image::builder(format!("{}/debian/python:3.11", registry.address)).store(place.store.clone());
    let image = image.pull().await.unwrap();
    image.start(config().memory(Bytes::mib(384))).await.unwrap_or_else(|error| panic!("{error:?}"))
}

#[tokio::test]
async fn python_from_a_registry_computes_what_it_computes_here() {
    let python = tokio::task::spawn_blocking(python::PythonImage::ensure).await.unwrap();
    let vm = boot(&python).await;
    let out = vm.exec_builder().argv(["python3", "-c", PROGRAM]).timeout(guest::DEADLINE).output().await.unwrap();
    assert!(out.success() && out.stderr.is_empty(), "{}", show(&out));
    let there = String::from_utf8(out.stdout).unwrap();

    let here = tokio::task::spawn_blocking(move || python.run_here(PROGRAM)).await.unwrap();
    for (line, (here, there)) in here.lines().zip(there.lines()).enumerate() {
        assert_eq!(there, here, "line {} of the output", line + 1);
    }
    assert_eq!(there.lines().count(), here.lines().count());
    // And it is right, not only the same: what the standard says of "abc", and 300 digits of pi.
    assert!(there.contains("abc ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad\n"));
    assert!(there.contains("\npi 31415926535897932384626433832795028841971693993751058209749445923078164062862089986"));
    assert!(there.ends_with("(3, 11)\n"));

    converse(&vm).await;
}

#[tokio::test]
async fn every_module_is_imported_and_every_installed_file_is_what_was_installed() {
    let python = tokio::task::spawn_blocking(python::PythonImage::ensure).await.unwrap();
    let vm = boot(&python).await;
    let out = vm.exec_builder().argv(["python3", "-c", INSTALLED]).timeout(guest::DEADLINE).output().await.unwrap();
    assert!(out.success() && out.stderr.is_empty(), "{}", show(&out));
    let out = String::from_utf8(out.stdout).unwrap();
    let lines: Vec<&str> = out.lines().collect();
    let [modules, files] = lines.as_slice() else { panic!("{out}") };
    // Those of Windows and macOS, and what Debian has in packages of its own or with libraries that are not here.
    assert_eq!(*modules, MODULES);
    let numbers: Vec<u64> = files.split(' ').filter_map(|word| word.parse().ok()).collect();
    assert!(matches!(numbers.as_slice(), [800..=u64::MAX, 30_000_000..=u64::MAX]), "{files}");
}

/// An interpreter that is talked to: state between the lines, and its traceback on stderr.
async fn converse(vm: &Vm) {
    let mut child = vm.exec(["python3", "-iqu", "-c", "x = 6"]).await.unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"y = x * 7\nprint(y)\nundefined\nprint(y + 1)\nraise SystemExit(5)\n").await.unwrap();
    drop(stdin);
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (mut out, mut err) = (String::new(), String::new());
    tokio::try_join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err)).unwrap();
    assert_eq!(out, "42\n43\n", "{err}");
    assert!(err.contains("NameError: name 'undefined' is not defined"), "{err}");
    assert_eq!(child.wait().await.unwrap().code(), Some(5));
}
