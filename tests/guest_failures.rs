//! Guests that fail, on the real software engine: each is a typed error within its deadline, with the console's
//! last lines. The other ways a start can fail are in `vm_lifecycle`.

#[path = "support/guest.rs"]
mod guest;
mod image_support;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use guest::BUSYBOX;
use guest::config;
use guest::sh;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::code_asm::al;
use iced_x86::code_asm::dx;
use iced_x86::code_asm::eax;
use iced_x86::code_asm::edi;
use iced_x86::code_asm::edx;
use image_support::LayerBlob;
use image_support::Place;
use image_support::Tar;
use kiln::ExecError;
use kiln::StartError;
use kiln::Vm;
use kiln::VmConfig;
use kiln::units::Bytes;
use kiln::vm::Agent;
use kiln::vm::Assets;
use kiln::vm::GuestRoot;
use kiln::vm::Kernel;
use kiln::vm::VmEnd;

/// Where a kernel made here is loaded and entered.
const KERNEL_AT: u64 = 0x10_0000;
/// Where a program made here is.
const PROGRAM_AT: u64 = 0x40_0000;

/// Files of one test, and an empty root image.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// Starts a VM that must not come up, and says so in time.
    async fn refused(&self, config: VmConfig) -> StartError {
        let root = GuestRoot::erofs(self.write("root.erofs", &[0; 4096]));
        let limit = Duration::from_secs(30);
        let start = tokio::time::timeout(limit, Vm::start(root, config.memory(Bytes::mib(128)))).await;
        start.expect("an error in time").expect_err("it must not start")
    }

    /// With `code` as the kernel.
    async fn kernel(&self, code: &[u8], boot_timeout: Duration) -> StartError {
        let kernel = Kernel::Path(self.write("vmlinux", &elf(KERNEL_AT, code)));
        self.refused(config().kernel(kernel).boot_timeout(boot_timeout)).await
    }

    /// With `file` as the agent under the real kernel.
    async fn agent(&self, file: &[u8], boot_timeout: Duration) -> StartError {
        let agent = Agent::Path(self.write("agent", file));
        self.refused(config().agent(agent).boot_timeout(boot_timeout)).await
    }
}

/// A static ELF executable of `code`, loaded and entered at `address`.
fn elf(address: u64, code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 4096];
    let mut set = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, b"\x7fELF\x02\x01\x01");
    // ET_EXEC for x86-64, version 1.
    set(16, &[2, 0, 62, 0, 1]);
    set(24, &address.to_le_bytes());
    set(32, &64_u64.to_le_bytes());
    set(52, &[64, 0, 56, 0, 1]);
    // PT_LOAD, readable and executable, from the second page of the file.
    set(64, &[1, 0, 0, 0, 5]);
    set(72, &4096_u64.to_le_bytes());
    set(80, &address.to_le_bytes());
    set(88, &address.to_le_bytes());
    set(96, &(code.len() as u64).to_le_bytes());
    set(104, &(code.len() as u64).to_le_bytes());
    set(112, &4096_u64.to_le_bytes());
    file.extend_from_slice(code);
    file
}

fn assemble(address: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    write(&mut assembler).unwrap();
    assembler.assemble(address).unwrap()
}

/// Writes `text` to the serial port.
fn print(a: &mut CodeAssembler, text: &str) -> Result<(), iced_x86::IcedError> {
    a.mov(edx, 0x3f8)?;
    for byte in text.bytes() {
        a.mov(al, u32::from(byte))?;
        a.out(dx, al)?;
    }
    Ok(())
}

#[tokio::test]
async fn a_kernel_that_faults_without_a_handler_is_a_triple_fault() {
    let files = Files::new();
    // No IDT: #UD finds no gate, nor does the #DF that follows.
    let code = assemble(KERNEL_AT, |a| {
        print(a, "first line\nlast words\n")?;
        a.ud2()
    });
    let error = files.kernel(&code, guest::DEADLINE).await;
    assert!(matches!(error, StartError::TripleFault { .. }), "{error:?}");
    assert_eq!(error.console(), ["first line", "last words"]);
}

#[tokio::test]
async fn a_kernel_that_spins_or_sleeps_for_ever_is_stopped_at_the_deadline() {
    let spin = assemble(KERNEL_AT, |a| {
        print(a, "spinning\n")?;
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.jmp(here)
    });
    let sleep = assemble(KERNEL_AT, |a| {
        print(a, "sleeping\n")?;
        a.cli()?;
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.hlt()?;
        a.jmp(here)
    });
    for (code, line) in [(spin, "spinning"), (sleep, "sleeping")] {
        let files = Files::new();
        let began = Instant::now();
        let error = files.kernel(&code, Duration::from_millis(300)).await;
        let after = Duration::from_millis(300);
        assert!(matches!(error, StartError::AgentTimeout { after: told, .. } if told == after), "{error:?}");
        assert_eq!(error.console(), [line]);
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}

#[tokio::test]
async fn a_kernel_cut_short_or_for_another_machine_is_none() {
    let files = Files::new();
    let vmlinux = fs::read(Assets::user().unwrap().kernel()).unwrap();
    let mut arm = elf(KERNEL_AT, &[0; 64]);
    arm[18] = 183;
    for (name, bytes) in
        [("half", &vmlinux[..vmlinux.len() / 2]), ("header", &vmlinux[..100]), ("empty", &[]), ("arm", &arm)]
    {
        let path = files.write(name, bytes);
        match files.refused(config().kernel(Kernel::Path(path.clone()))).await {
            StartError::KernelNotElf { path: told, .. } => assert_eq!(told, path),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn an_agent_that_is_no_program_is_a_kernel_panic() {
    let error = Files::new().agent(b"not a program", guest::DEADLINE).await;
    assert!(matches!(&error, StartError::KernelPanic { message, .. } if message.contains("init")), "{error:?}");
    assert!(error.console().iter().any(|line| line.contains("Kernel panic - not syncing")), "{error:?}");
}

#[tokio::test]
async fn an_agent_that_ends_or_crashes_is_a_kernel_panic() {
    // exit(7)
    let ends = assemble(PROGRAM_AT, |a| {
        a.mov(edi, 7)?;
        a.mov(eax, 60)?;
        a.syscall()
    });
    // SIGILL is 4.
    let crashes = assemble(PROGRAM_AT, CodeAssembler::ud2);
    for (code, exit) in [(ends, "exitcode=0x00000700"), (crashes, "exitcode=0x00000004")] {
        match Files::new().agent(&elf(PROGRAM_AT, &code), guest::DEADLINE).await {
            StartError::KernelPanic { message, console } => {
                assert!(message.contains("Attempted to kill init") && message.contains(exit), "{message}");
                assert!(console.iter().any(|line| line.contains(exit)), "{console:?}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn an_agent_that_never_answers_is_a_timeout_with_what_it_said() {
    // As PID 1 it is busybox's init, which finds nothing to start and waits.
    let busybox = fs::read(BUSYBOX).unwrap();
    let began = Instant::now();
    let error = Files::new().agent(&busybox, Duration::from_secs(3)).await;
    assert!(matches!(error, StartError::AgentTimeout { .. }), "{error:?}");
    assert!(error.console().iter().any(|line| line.contains("rcS")), "{error:?}");
    assert!(began.elapsed() >= Duration::from_secs(3) && began.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn a_root_image_that_cannot_be_mounted_is_told_by_the_console() {
    let error = Files::new().refused(config()).await;
    assert!(matches!(error, StartError::KernelPanic { .. } | StartError::TripleFault { .. }), "{error:?}");
    assert!(error.console().iter().any(|line| line.contains("/dev/vda")), "{error:?}");
}

#[tokio::test]
async fn memory_too_small_for_the_kernel_is_refused() {
    let files = Files::new();
    let root = GuestRoot::erofs(files.write("root.erofs", &[0; 4096]));
    let error = Vm::start(root, config().memory(Bytes::mib(8))).await.unwrap_err();
    assert!(matches!(error, StartError::Machine(_)), "{error:?}");
}

#[tokio::test]
async fn a_layer_that_escapes_starts_no_vm() {
    let place = Place::new().await;
    let outside = place.folder.path().join("escaped");
    let image = place.import(&[LayerBlob::plain(Tar::new().file("../escaped", b"x").finish())]).await;
    let error = image.start(config()).await.unwrap_err();
    assert!(matches!(error, StartError::Rootfs(_)), "{error:?}");
    assert!(!outside.exists());
}

/// A guest of 96 MiB that promises more memory than it has.
async fn small_guest() -> Vm {
    let config = config().memory(Bytes::mib(96)).overlay_size(Bytes::mib(16));
    let vm = guest::boot_with(serde_json::json!({}), config).await;
    sh(&vm, "echo 1 > /proc/sys/vm/overcommit_memory").await;
    vm
}

/// Touches more memory than [`small_guest`] has.
const GREEDY: &str = "exec dd if=/dev/zero of=/dev/null bs=200M count=1";

#[tokio::test]
async fn a_program_out_of_memory_is_killed_and_the_guest_goes_on() {
    let vm = small_guest().await;
    let out = guest::outcome(&vm, GREEDY).await;
    assert_eq!(out.status.signal(), Some(9), "{}", guest::show(&out));
    assert_eq!(sh(&vm, "echo alive").await, "alive\n");
}

#[tokio::test]
async fn a_panic_of_a_running_guest_is_how_it_ended() {
    let vm = small_guest().await;
    sh(&vm, "echo 2 > /proc/sys/vm/panic_on_oom").await;
    let out = guest::shell(&vm, GREEDY).output().await;
    assert!(matches!(out, Err(ExecError::AgentGone(_))), "{out:?}");
    match tokio::time::timeout(Duration::from_secs(10), vm.wait()).await.expect("an end in time") {
        VmEnd::KernelPanic { message, console } => {
            assert!(message.contains("Out of memory"), "{message}");
            assert!(console.iter().any(|line| line.contains("Kernel panic")), "{console:?}");
        }
        other => panic!("{other:?}"),
    }
}
