//! Starting and ending VMs, with processors that follow a script instead of running code: every way a
//! start can fail is a typed error within its deadline, and stopping always works.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use kiln::hv::state::VcpuState;
use kiln::hv::{Exit, HvError, HvVm, Hypervisor, IoHandler, IrqLine, Kick, Vcpu, VcpuSeed, VmSpec};
use kiln::mem::GuestRam;
use kiln::units::{Bytes, Gsi, VcpuId};
use kiln::vm::{Agent, Assets, GuestRoot, Kernel, StartError, Vm, VmConfig};
use kiln::vmm::{Machine, MachineConfig, MachineEnd};

/// What the processor does instead of executing the kernel.
#[derive(Clone, Debug)]
enum Script {
    /// Prints, then shuts down.
    PrintThenShutDown(&'static str),
    /// Prints, then sleeps until kicked.
    PrintThenSleep(&'static str),
    /// Meets an instruction that it does not have.
    Fail,
    /// Has a defect.
    Panic,
}

#[derive(Debug)]
struct Scripted {
    script: Script,
    /// Set when the vCPU's thread has let go of everything.
    over: Arc<AtomicBool>,
}

impl Scripted {
    fn new(script: Script) -> Arc<Self> {
        Arc::new(Self { script, over: Arc::default() })
    }
}

impl Hypervisor for Scripted {
    fn create_vm(&self, _spec: &VmSpec, ram: Arc<GuestRam>) -> Result<Box<dyn HvVm>, HvError> {
        Ok(Box::new(ScriptedVm { script: self.script.clone(), ram, over: Arc::clone(&self.over) }))
    }
}

#[derive(Debug)]
struct ScriptedVm {
    script: Script,
    ram: Arc<GuestRam>,
    over: Arc<AtomicBool>,
}

impl HvVm for ScriptedVm {
    fn create_vcpu(&self, _id: VcpuId) -> Result<Box<dyn VcpuSeed>, HvError> {
        Ok(Box::new(ScriptedSeed {
            script: self.script.clone(),
            ram: Arc::clone(&self.ram),
            over: Arc::clone(&self.over),
            kick: Arc::default(),
        }))
    }

    fn irq_line(&self, _gsi: Gsi) -> Result<Arc<dyn IrqLine>, HvError> {
        Ok(Arc::new(NoLine))
    }
}

#[derive(Debug)]
struct NoLine;

impl IrqLine for NoLine {
    fn raise(&self) {}
    fn set_level(&self, _high: bool) {}
}

#[derive(Debug, Default)]
struct Kicked {
    kicked: Mutex<bool>,
    changed: Condvar,
}

impl Kick for Kicked {
    fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_one();
    }
}

#[derive(Debug)]
struct ScriptedSeed {
    script: Script,
    ram: Arc<GuestRam>,
    over: Arc<AtomicBool>,
    kick: Arc<Kicked>,
}

#[derive(Debug)]
struct ScriptedCpu {
    seed: ScriptedSeed,
    io: Box<dyn IoHandler>,
}

impl Drop for ScriptedSeed {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}

impl VcpuSeed for ScriptedSeed {
    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn bind(self: Box<Self>, io: Box<dyn IoHandler>) -> Result<Box<dyn Vcpu>, HvError> {
        assert!(std::thread::current().name().is_some_and(|name| name == "vcpu-0"));
        Ok(Box::new(ScriptedCpu { seed: *self, io }))
    }
}

impl ScriptedCpu {
    fn print(&mut self, text: &str) {
        text.bytes().for_each(|byte| self.io.pio_out(0x3f8, &[byte]));
    }

    fn sleep(&self) -> Exit {
        let kicked = self.seed.kick.kicked.lock().unwrap();
        *self.seed.kick.changed.wait_while(kicked, |kicked| !*kicked).unwrap() = false;
        Exit::Kicked
    }
}

impl Vcpu for ScriptedCpu {
    fn run(&mut self) -> Result<Exit, HvError> {
        match self.seed.script.clone() {
            Script::PrintThenShutDown(text) => {
                self.print(text);
                Ok(Exit::Shutdown)
            }
            Script::PrintThenSleep(text) => {
                self.print(text);
                Ok(self.sleep())
            }
            Script::Fail => Err(HvError::Unimplemented { rip: 0xdead, bytes: vec![0x0f, 0x0b], what: "scripted" }),
            Script::Panic => panic!("scripted"),
        }
    }

    fn save(&mut self) -> Result<VcpuState, HvError> {
        Err(HvError::Unsupported("saving"))
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), HvError> {
        // The kernel is where the state says that it begins.
        let entry =
            self.seed.ram.offset_of(kiln::units::GuestAddr(state.rip)).and_then(|at| self.seed.ram.load::<u8>(at));
        assert_eq!(entry, Some(0xf4));
        Ok(())
    }
}

/// A folder with a kernel (one HLT), an agent and a root image.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        fs::write(files.kernel(), kernel()).unwrap();
        fs::write(files.agent(), b"agent").unwrap();
        fs::write(files.root(), [0; 4096]).unwrap();
        files
    }

    fn kernel(&self) -> PathBuf {
        self.0.path().join("vmlinux")
    }

    fn agent(&self) -> PathBuf {
        self.0.path().join("kiln-agent")
    }

    fn root(&self) -> PathBuf {
        self.0.path().join("root.erofs")
    }

    fn config(&self, script: Script) -> VmConfig {
        VmConfig::new()
            .memory(Bytes::mib(8))
            .kernel(Kernel::Path(self.kernel()))
            .agent(Agent::Path(self.agent()))
            .engine(Scripted::new(script))
            .boot_timeout(Duration::from_secs(60))
    }

    async fn start(&self, config: VmConfig) -> StartError {
        Vm::start(GuestRoot::erofs(self.root()), config).await.expect_err("no script has an agent")
    }
}

/// The smallest ELF file the loader takes: HLT at 1 MiB.
fn kernel() -> Vec<u8> {
    let mut file = vec![0u8; 120];
    let mut set = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, b"\x7fELF\x02\x01");
    set(16, &[2, 0, 62]);
    set(24, &0x10_0000u64.to_le_bytes());
    set(32, &64u64.to_le_bytes());
    set(54, &[56, 0, 1]);
    set(64, &[1]);
    set(72, &120u64.to_le_bytes());
    set(88, &0x10_0000u64.to_le_bytes());
    set(96, &1u64.to_le_bytes());
    set(104, &4096u64.to_le_bytes());
    file.push(0xf4);
    file
}

fn machine(script: Script) -> (Machine, Arc<AtomicBool>) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&kernel()).unwrap();
    let config = MachineConfig {
        memory: Bytes::mib(8),
        vcpus: std::num::NonZeroU8::MIN,
        kernel: file,
        initramfs: Vec::new(),
        disks: Vec::new(),
        verbose_boot: false,
        extra_cmdline: String::new(),
    };
    let engine = Scripted::new(script);
    (Machine::start(&*engine, config).unwrap(), Arc::clone(&engine.over))
}

#[tokio::test]
async fn a_missing_kernel_names_the_command_that_builds_it() {
    let files = Files::new();
    let config = files.config(Script::Fail).kernel(Kernel::Cached).assets(Assets::at(files.0.path()));
    match files.start(config).await {
        StartError::KernelMissing { searched, command } => {
            assert_eq!(searched, files.0.path().join("kernel/current/vmlinux"));
            assert_eq!(command, "cargo xtask kernel");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_missing_agent_names_the_command_that_builds_it() {
    let files = Files::new();
    let config = files.config(Script::Fail).agent(Agent::Path("/nonexistent/agent".into()));
    match files.start(config).await {
        StartError::AgentMissing { searched, command } => {
            assert_eq!(searched, Path::new("/nonexistent/agent"));
            assert_eq!(command, "cargo xtask agent");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_kernel_that_is_not_one_is_named() {
    let files = Files::new();
    fs::write(files.kernel(), b"#!/bin/sh").unwrap();
    match files.start(files.config(Script::Fail)).await {
        StartError::KernelNotElf { path, .. } => assert_eq!(path, files.kernel()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_missing_root_image_is_named() {
    let files = Files::new();
    fs::remove_file(files.root()).unwrap();
    match files.start(files.config(Script::Fail)).await {
        StartError::Unreadable { path, .. } => assert_eq!(path, files.root()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn settings_that_cannot_be_are_refused() {
    let files = Files::new();
    assert!(matches!(files.start(files.config(Script::Fail).vcpus(9)).await, StartError::Config(_)));
    assert!(matches!(files.start(files.config(Script::Fail).memory(Bytes(4097))).await, StartError::Machine(_)));
    assert!(matches!(files.start(files.config(Script::Fail).memory(Bytes::mib(1))).await, StartError::Machine(_)));
}

#[tokio::test]
async fn a_kernel_panic_is_told_with_its_message_and_the_console() {
    let files = Files::new();
    let text = "hello\n[    0.5] Kernel panic - not syncing: VFS: Unable to mount root fs\n---[ end ]---\n";
    match files.start(files.config(Script::PrintThenShutDown(text))).await {
        StartError::KernelPanic { message, console } => {
            assert_eq!(message, "VFS: Unable to mount root fs");
            assert_eq!(console.first().map(String::as_str), Some("hello"));
            assert_eq!(console.len(), 3);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_triple_fault_is_told_with_the_console() {
    let files = Files::new();
    let error = files.start(files.config(Script::PrintThenShutDown("last words\n"))).await;
    assert!(matches!(error, StartError::TripleFault { .. }), "{error:?}");
    assert_eq!(error.console(), ["last words"]);
}

#[tokio::test]
async fn an_agent_that_never_answers_is_a_timeout_and_the_guest_is_stopped() {
    let files = Files::new();
    let engine = Scripted::new(Script::PrintThenSleep("waiting\n"));
    let config = files.config(Script::Fail).engine(engine.clone()).boot_timeout(Duration::from_millis(200));
    let began = Instant::now();
    let error = files.start(config).await;
    assert!(matches!(error, StartError::AgentTimeout { .. }), "{error:?}");
    assert_eq!(error.console(), ["waiting"]);
    assert!(began.elapsed() < Duration::from_secs(10));
    wait_until(&engine.over);
}

#[tokio::test]
async fn what_the_engine_cannot_do_is_told_with_address_and_bytes() {
    let files = Files::new();
    match files.start(files.config(Script::Fail)).await {
        StartError::Engine { source, .. } => {
            assert!(matches!(&*source, HvError::Unimplemented { rip: 0xdead, bytes, .. } if bytes == &[0x0f, 0x0b]));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_defect_in_the_engine_is_an_error_and_not_a_hang() {
    let files = Files::new();
    let error = files.start(files.config(Script::Panic)).await;
    assert!(matches!(error, StartError::EnginePanicked { .. }), "{error:?}");
}

#[tokio::test]
async fn a_machine_stops_when_asked_and_says_so_each_time() {
    let (machine, over) = machine(Script::PrintThenSleep("up\n"));
    machine.console().follow().find("up").await;
    machine.stop();
    machine.stop();
    assert!(matches!(machine.ended().await, MachineEnd::Stopped));
    assert!(matches!(machine.ended().await, MachineEnd::Stopped));
    wait_until(&over);
}

#[tokio::test]
async fn dropping_a_machine_ends_it_without_waiting() {
    let (machine, over) = machine(Script::PrintThenSleep("up\n"));
    machine.console().follow().find("up").await;
    let ended = machine.ended();
    drop(machine);
    assert!(matches!(ended.await, MachineEnd::Stopped));
    wait_until(&over);
}

/// Another thread is about to set `flag`.
fn wait_until(flag: &AtomicBool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !flag.load(Ordering::Acquire) {
        assert!(Instant::now() < deadline, "never happened");
        std::thread::yield_now();
    }
}
