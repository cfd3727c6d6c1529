//! Writes an initramfs: a cpio archive in the "newc" form (Linux
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Only what a first process needs: folders, regular files and device nodes, all owned by root.

const MAGIC: &str = "070701";
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";

/// Builds an archive in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder. Names have no leading slash; a folder comes before what is in it.
    #[must_use]
    pub fn dir(self, name: &str, mode: u32) -> Self {
        self.entry(name, S_IFDIR | mode, (0, 0), &[])
    }

    /// Adds a file. Contents of 4 GiB or more do not fit the form.
    ///
    /// # Panics
    /// When `contents` is 4 GiB or longer.
    #[must_use]
    pub fn file(self, name: &str, mode: u32, contents: &[u8]) -> Self {
        self.entry(name, S_IFREG | mode, (0, 0), contents)
    }

    /// Adds a character device.
    #[must_use]
    pub fn char_device(self, name: &str, mode: u32, major: u32, minor: u32) -> Self {
        self.entry(name, S_IFCHR | mode, (major, minor), &[])
    }

    /// Ends the archive.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.entry(TRAILER, 0, (0, 0), &[]).bytes
    }

    fn entry(mut self, name: &str, mode: u32, device: (u32, u32), contents: &[u8]) -> Self {
        let size = u32::try_from(contents.len()).expect("callers keep files below 4 GiB, as the form demands");
        self.inode += 1;
        self.bytes.extend_from_slice(MAGIC.as_bytes());
        let name_size = name.len() as u32 + 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(contents);
        self.pad();
        self
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The initramfs of a guest: the agent as `/init`, its configuration as `/kiln.json`, and a console
/// for it to be born with.
#[must_use]
pub fn initramfs(agent: &[u8], config: &[u8]) -> Vec<u8> {
    Archive::new()
        .dir("dev", 0o755)
        .char_device("dev/console", 0o600, 5, 1)
        .file("init", 0o755, agent)
        .file("kiln.json", 0o600, config)
        .finish()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    /// A second opinion: GNU cpio is what the kernel's own build uses.
    #[test]
    fn cpio_lists_what_was_put_in() {
        let archive = initramfs(b"agent!!", b"{}");
        let Ok(mut cpio) = Command::new("cpio")
            .args(["--list", "--verbose", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            return parse_by_hand(&archive);
        };
        cpio.stdin.take().unwrap().write_all(&archive).unwrap();
        let out = cpio.wait_with_output().unwrap();
        assert!(out.status.success());
        let list = String::from_utf8(out.stdout).unwrap();
        let lines: Vec<&str> = list.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with("dev"));
        assert!(lines[1].starts_with("crw-------") && lines[1].contains("5,   1"));
        assert!(lines[2].starts_with("-rwxr-xr-x") && lines[2].ends_with("init"));
        assert!(lines[3].starts_with("-rw-------") && lines[3].ends_with("kiln.json"));
        parse_by_hand(&archive);
    }

    fn parse_by_hand(archive: &[u8]) {
        let mut at = 0;
        let mut names = Vec::new();
        while at < archive.len() {
            let field = |n: usize| {
                let hex = std::str::from_utf8(&archive[at + 6 + n * 8..at + 14 + n * 8]).unwrap();
                usize::from_str_radix(hex, 16).unwrap()
            };
            assert_eq!(&archive[at..at + 6], MAGIC.as_bytes());
            let (size, name_size) = (field(6), field(11));
            names.push(String::from_utf8(archive[at + 110..at + 109 + name_size].to_vec()).unwrap());
            at = (at + 110 + name_size).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        assert_eq!(names, ["dev", "dev/console", "init", "kiln.json", TRAILER]);
    }
}
