//! PID 1: from the initramfs to the image's own root, with what a Linux program expects around it.
//!
//! ```text
//!   initramfs:  /init (this program)  /kiln.json
//!   /lower   the root device, read-only        \
//!   /rw      tmpfs of limited size: upper, work } -> overlay on /newroot, which becomes /
//! ```

use std::fmt;
use std::fs;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use kiln_wire::boot::CONFIG_PATH;
use kiln_wire::boot::GuestConfig;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::mount::MountFlags;

use crate::files;
use crate::renew;
use crate::sys::net;
use crate::workdir;

/// How long the root device may take to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(2);

/// A step of the boot that failed.
#[derive(Debug)]
pub(crate) struct BootError {
    step: String,
    source: io::Error,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.source)
    }
}

/// Names the step that an error belongs to.
trait Step<T> {
    fn step(self, step: &str) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &str) -> Result<T, BootError> {
        self.map_err(|source| BootError { step: step.to_owned(), source: source.into() })
    }
}

const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);

/// Gives the guest a `/dev` and this process standard streams, so that everything later can report errors.
pub(crate) fn open_console() -> Result<(), BootError> {
    make_dir("/dev", 0o755)?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    match mount("devtmpfs", "/dev", "devtmpfs", flags, "mode=0755") {
        // The kernel may have mounted it already (CONFIG_DEVTMPFS_MOUNT).
        Err(error) if error.kind() != io::ErrorKind::ResourceBusy => return Err(error).step("mounting /dev"),
        _ => {}
    }
    let open = |path: &str| rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
    // Descriptors 0 to 2 must be taken, or the first three that are opened become some process's standard streams.
    let mut fd = open("/dev/console").or_else(|_| open("/dev/null")).step("opening /dev/console")?;
    rustix::stdio::dup2_stdin(&fd).step("standard input")?;
    rustix::stdio::dup2_stdout(&fd).step("standard output")?;
    rustix::stdio::dup2_stderr(&fd).step("standard error")?;
    while std::os::fd::AsRawFd::as_raw_fd(&fd) <= 2 {
        let higher = rustix::io::fcntl_dupfd_cloexec(&fd, 3).step("standard streams")?;
        // Closing it would close a standard stream: forgetting the low one is the point.
        std::mem::forget(std::mem::replace(&mut fd, higher));
    }
    Ok(())
}

/// Reads the boot configuration.
pub(crate) fn read_config() -> Result<GuestConfig, BootError> {
    let json = fs::read(CONFIG_PATH).step(CONFIG_PATH)?;
    serde_json::from_slice(&json).map_err(io::Error::from).step(CONFIG_PATH)
}

/// Builds the guest's root and moves into it.
pub(crate) fn enter_root(config: &GuestConfig) -> Result<(), BootError> {
    mount_overlay(config)?;
    mount_kernel_views()?;
    // The initramfs stays in memory underneath: its files are of no more use.
    let _ = fs::remove_file(CONFIG_PATH);
    let _ = fs::remove_file("/init");
    std::env::set_current_dir("/newroot").step("entering the new root")?;
    rustix::mount::mount_move(".", "/").step("moving the new root")?;
    rustix::process::chroot(".").step("entering the new root")?;
    std::env::set_current_dir("/").step("entering the new root")
}

/// Name, name resolution, loopback, working directory: what may fail without making the guest useless.
///
/// Returns what failed.
pub(crate) fn settle_in(config: &GuestConfig) -> Vec<BootError> {
    let mut complaints = Vec::new();
    let mut attempt = |result: Result<(), BootError>| complaints.extend(result.err());
    attempt(rustix::system::sethostname(config.hostname.as_bytes()).step("setting the host name"));
    attempt(net::loopback_up().step("bringing the loopback interface up"));
    if let Some(text) = &config.resolv_conf {
        attempt(write_etc("resolv.conf", text));
    }
    if !Path::new("/etc/hosts").exists() {
        attempt(write_etc("hosts", &renew::hosts(&config.hostname)));
    }
    if let Some(id) = &config.machine_id {
        attempt(renew::write_machine_id(id).step("machine-id"));
    }
    // Where it cannot be made, commands fail to enter it, and say so; those that name another one run.
    attempt(workdir::make(Path::new("/"), Path::new(&config.workdir)).step("creating the working directory"));
    complaints
}

fn mount(source: &str, target: &str, kind: &str, flags: MountFlags, options: &str) -> io::Result<()> {
    let options = std::ffi::CString::new(options)?;
    Ok(rustix::mount::mount(source, target, kind, flags, options.as_c_str())?)
}

fn make_dir(path: &str, mode: u32) -> Result<(), BootError> {
    match fs::create_dir(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(mode)).step(path),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error).step(path),
    }
}

fn mount_overlay(config: &GuestConfig) -> Result<(), BootError> {
    for dir in ["/lower", "/rw", "/newroot"] {
        make_dir(dir, 0o755)?;
    }
    wait_for(&config.root_device).step("waiting for the root device")?;
    mount(&config.root_device, "/lower", &config.root_fs, MountFlags::RDONLY, "")
        .step(&format!("mounting {} as {}", config.root_device, config.root_fs))?;
    let size = format!("size={},mode=0755", config.overlay_size_bytes);
    mount("tmpfs", "/rw", "tmpfs", MountFlags::empty(), &size).step("mounting the writable layer")?;
    make_dir("/rw/upper", 0o755)?;
    make_dir("/rw/work", 0o755)?;
    // The overlay's root shows the upper folder's owner and mode: they must be the image's.
    let root = fs::metadata("/lower").step("/lower")?;
    fs::set_permissions("/rw/upper", root.permissions()).step("/rw/upper")?;
    std::os::unix::fs::chown("/rw/upper", Some(root.uid()), Some(root.gid())).step("/rw/upper")?;
    let layers = "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work";
    mount("overlay", "/newroot", "overlay", MountFlags::empty(), layers).step("mounting the overlay")
}

/// Virtual devices are there before PID 1; this is for one that probes late.
fn wait_for(device: &str) -> io::Result<()> {
    let deadline = Instant::now() + DEVICE_DEADLINE;
    loop {
        match fs::metadata(device) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            found => return found.map(|_| ()),
        }
    }
}

fn mount_kernel_views() -> Result<(), BootError> {
    for dir in ["/newroot/proc", "/newroot/sys", "/newroot/dev", "/newroot/run", "/newroot/etc"] {
        make_dir(dir, 0o755)?;
    }
    make_dir("/newroot/tmp", 0o1777)?;
    rustix::mount::mount_move("/dev", "/newroot/dev").step("moving /dev")?;
    mount("proc", "/newroot/proc", "proc", QUIET, "").step("mounting /proc")?;
    mount("sysfs", "/newroot/sys", "sysfs", QUIET, "").step("mounting /sys")?;
    make_dir("/newroot/dev/pts", 0o755)?;
    make_dir("/newroot/dev/shm", 0o1777)?;
    let no_programs = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devpts", "/newroot/dev/pts", "devpts", no_programs, "mode=0620,gid=5,ptmxmode=0666")
        .step("mounting /dev/pts")?;
    let no_devices = MountFlags::NOSUID | MountFlags::NODEV;
    mount("tmpfs", "/newroot/dev/shm", "tmpfs", no_devices, "mode=1777").step("mounting /dev/shm")?;
    for (name, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        // An image or kernel that has the name already keeps it.
        let _ = symlink(format!("/proc/self/fd{target}"), format!("/newroot/dev/{name}"));
    }
    Ok(())
}

/// Replaces a file of `/etc`; a link there (often dangling, into a daemon's folder) is replaced, not followed.
fn write_etc(name: &str, text: &str) -> Result<(), BootError> {
    files::write_atomically(&Path::new("/etc").join(name), text.as_bytes(), None).step(name)
}
