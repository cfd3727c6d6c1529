//! A VM's files and TCP ports: what [`crate::files`] and [`crate::tcp`] offer, by the VM's own agent.

use std::io;
use std::net::Ipv4Addr;
use std::net::SocketAddr;
use std::path::PathBuf;

use super::Vm;
use crate::exec::ExecError;
use crate::files::FileError;
use crate::files::GuestFileReader;
use crate::files::GuestFileWriter;
use crate::files::GuestFiles;
use crate::files::Unpacked;
use crate::tcp::GuestTcpStream;
use crate::tcp::TcpForwarder;

impl Vm {
    /// The guest's files, as a handle that other tasks can have too.
    #[must_use]
    pub fn files(&self) -> GuestFiles {
        GuestFiles::for_link(self.agent.clone())
    }

    /// Writes a file of mode 0644 whole, replacing what was there; see [`GuestFiles::write`].
    ///
    /// # Errors
    /// [`FileError::Guest`]: no such folder, no space, or the guest is gone. What was at `path` is then untouched.
    ///
    /// # Cancel safety
    /// Cancelled, the file was written whole or not at all.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), kiln::Error> {
    /// vm.write_file("/srv/job.py", "print(6 * 7)\n").await?;
    /// let out = vm.exec_builder().argv(["python3", "/srv/job.py"]).output().await?;
    /// assert_eq!(out.stdout, b"42\n");
    /// # Ok(()) }
    /// ```
    pub async fn write_file(&self, path: impl Into<String>, content: impl AsRef<[u8]>) -> Result<(), FileError> {
        self.files().write(path, content).await
    }

    /// Reads a file of 64 MiB at most; see [`GuestFiles::read`].
    ///
    /// # Errors
    /// [`FileError::Guest`]: no such file, not a regular one, or the guest is gone; [`FileError::TooLarge`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn read_file(&self, path: impl Into<String>) -> Result<Vec<u8>, FileError> {
        self.files().read(path).await
    }

    /// Opens a regular file of any size for reading; see [`GuestFiles::open_read`].
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    ///
    /// # Cancel safety
    /// Cancel safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), kiln::Error> {
    /// let mut core = vm.open_read("/tmp/core").await?;
    /// let mut file = tokio::fs::File::create("core").await?;
    /// tokio::io::copy(&mut core, &mut file).await?;
    /// # Ok(()) }
    /// ```
    pub async fn open_read(&self, path: impl Into<String>) -> Result<GuestFileReader, FileError> {
        self.files().open_read(path).await
    }

    /// Opens a file of any size for writing; it appears when the writer is shut down. See [`GuestFiles::open_write`].
    ///
    /// # Errors
    /// As [`write_file`](Self::write_file).
    ///
    /// # Cancel safety
    /// Cancelled, nothing is at `path` that was not there before.
    pub async fn open_write(&self, path: impl Into<String>) -> Result<GuestFileWriter, FileError> {
        self.files().open_write(path).await
    }

    /// Copies a file or folder of the host's, with all that is in it, to the path `guest`; see [`GuestFiles::copy_in`].
    ///
    /// # Errors
    /// [`FileError::Pack`] for what cannot be read here; [`FileError::Guest`] for what the guest refuses.
    ///
    /// # Cancel safety
    /// Cancelled, a part of the tree may have been copied.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), kiln::Error> {
    /// vm.copy_in("my-project", "/srv/project").await?;
    /// vm.exec_builder().argv(["make"]).cwd("/srv/project").status().await?;
    /// vm.copy_out("/srv/project/target", "target").await?;
    /// # Ok(()) }
    /// ```
    pub async fn copy_in(&self, host: impl Into<PathBuf>, guest: impl Into<String>) -> Result<(), FileError> {
        self.files().copy_in(host, guest).await
    }

    /// Copies a file or folder of the guest's, with all that is in it, to the path `host`; see [`GuestFiles::copy_out`].
    ///
    /// # Errors
    /// [`FileError::Guest`] for what the guest refuses; [`FileError::Unpack`] for what cannot be written here.
    ///
    /// # Cancel safety
    /// Cancelled, a part of the tree may have been copied.
    pub async fn copy_out(&self, guest: impl Into<String>, host: impl Into<PathBuf>) -> Result<Unpacked, FileError> {
        self.files().copy_out(guest, host).await
    }

    /// Connects to a TCP port on the guest's loopback interface; see [`GuestTcpStream`].
    ///
    /// # Errors
    /// [`ExecError::System`] when the guest refuses, with [`ExecError::kind`] `ConnectionRefused` when nothing listens on `port`; else why the
    /// agent cannot be reached.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn connect(&self, port: u16) -> Result<GuestTcpStream, ExecError> {
        GuestTcpStream::connect(self.agent.connector(), port).await
    }

    /// Makes TCP port `guest_port` of the guest reachable at port `host_port` of this machine's 127.0.0.1, and from nowhere else.
    ///
    /// Port 0 takes a free one; [`TcpForwarder::local_addr`] has it. [`expose_tcp_on`](Self::expose_tcp_on) takes another address. Nothing
    /// need listen in the guest yet.
    ///
    /// # Errors
    /// Why the port cannot be listened on.
    ///
    /// # Cancel safety
    /// Cancel safe.
    ///
    /// # Examples
    /// ```no_run
    /// # async fn f(vm: kiln::Vm) -> Result<(), kiln::Error> {
    /// let web = vm.expose_tcp(0, 80).await?;
    /// println!("http://{}/", web.local_addr());
    /// # Ok(()) }
    /// ```
    pub async fn expose_tcp(&self, host_port: u16, guest_port: u16) -> io::Result<TcpForwarder> {
        self.expose_tcp_on((Ipv4Addr::LOCALHOST, host_port).into(), guest_port).await
    }

    /// As [`expose_tcp`](Self::expose_tcp), at any address of this machine's: whoever can reach it reaches the guest's server.
    ///
    /// # Errors
    /// As [`expose_tcp`](Self::expose_tcp).
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn expose_tcp_on(&self, address: SocketAddr, guest_port: u16) -> io::Result<TcpForwarder> {
        TcpForwarder::bind(address, guest_port, self.connector()).await
    }
}
