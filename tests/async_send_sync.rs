//! What the public types promise to async callers: they can move to another thread, be shared, and be polled
//! without pinning. The compiler checks the types, so that losing a promise fails here and not at a caller.

use std::future::Future;

use futures::stream::FusedStream;
use kiln::exec::Renewal;
use kiln::exec::UnixConnector;
use kiln::image::CredentialsError;
use kiln::image::DockerConfig;
use kiln::image::HelperError;
use kiln::image::ImageConfig;
use kiln::image::ImageStore;
use kiln::image::ImportOptions;
use kiln::image::Mirror;
use kiln::image::Platform;
use kiln::image::Progress;
use kiln::image::ProgressEvents;
use kiln::image::RegistryAuth;
use kiln::image::RegistryTransport;
use kiln::image::Tls;
use kiln::mem::GuestRam;
use kiln::mem::MemoryImage;
use kiln::rootfs;
use kiln::rootfs::RootImage;
use kiln::transport::GuestStream;
use kiln::vm::Assets;
use kiln::vm::GuestRoot;
use kiln::vm::VmEnd;
use kiln::vmm::FreezeError;
use kiln::vmm::Frozen;
use kiln::vmm::Machine;
use kiln::vmm::MachineConfig;
use kiln::vmm::MachineState;
use kiln::vmm::PauseError;
use kiln::vmm::RestoreError;
use kiln::vmm::SaveError;
use kiln::vmm::console::Console;
use kiln::*;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;

const fn value<T: Send + Sync + Unpin + 'static>() {}
const fn error<T: std::error::Error + Send + Sync + Unpin + 'static>() {}
const fn stream<T: FusedStream + Send + Unpin + 'static>() {}
const fn reader<T: AsyncRead + Send + Unpin + 'static>() {}
const fn writer<T: AsyncWrite + Send + Unpin + 'static>() {}

const _: () = {
    value::<Image>();
    value::<ImageConfig>();
    value::<ImageStore>();
    value::<ImportOptions>();
    value::<OciImageBuilder>();
    value::<PullPolicy>();
    value::<rootfs::Builder>();
    value::<RootImage>();
    value::<DockerConfig>();
    value::<Mirror>();
    value::<Platform>();
    value::<Progress>();
    value::<ProgressEvents>();
    value::<RegistryAuth>();
    value::<RegistryTransport>();
    value::<Tls>();
    value::<Vm>();
    value::<VmConfig>();
    value::<Baked>();
    value::<Renewal>();
    value::<Frozen>();
    value::<MemoryImage>();
    value::<Pool>();
    value::<PoolBuilder>();
    value::<PoolStats>();
    value::<PooledVm>();
    value::<VmEnd>();
    value::<Assets>();
    value::<GuestRoot>();
    value::<Machine>();
    value::<MachineConfig>();
    value::<MachineState>();
    value::<Snapshot>();
    value::<Console>();
    value::<GuestRam>();
    value::<hv::soft::Soft>();
    value::<ExecBuilder>();
    value::<ExecChild>();
    value::<ExecOutcome>();
    value::<ExecSignaller>();
    value::<UnixConnector>();
    value::<ExecEvents>();
    value::<ExecEvent>();
    value::<ExecExit>();
    value::<ExecSocket>();
    value::<GuestFiles>();
    value::<Workload>();
    value::<WorkloadBuilder>();
    value::<WorkloadLog>();
    stream::<WorkloadLogs>();
    value::<TcpForwarder>();

    error::<Error>();
    error::<ExecError>();
    error::<FileError>();
    error::<ImportError>();
    error::<LayoutError>();
    error::<PullError>();
    error::<PoolError>();
    error::<AcquireError>();
    error::<CredentialsError>();
    error::<HelperError>();
    error::<RootfsError>();
    error::<StartError>();
    error::<WorkloadError>();
    error::<ShutdownError>();
    error::<ForkError>();
    error::<FreezeError>();
    error::<KeepError>();
    error::<ReclaimError>();
    error::<PauseError>();
    error::<SaveError>();
    error::<RestoreError>();
    error::<SnapshotError>();

    reader::<ExecStdout>();
    reader::<GuestFileReader>();
    writer::<GuestFileWriter>();
    reader::<GuestTcpStream>();
    writer::<GuestTcpStream>();
    reader::<ExecStderr>();
    writer::<ExecStdin>();
    reader::<Box<dyn GuestStream>>();
    writer::<Box<dyn GuestStream>>();
};

/// What `tokio::spawn` asks of a future.
fn spawnable<F: Future + Send + 'static>(future: F) {
    drop(future);
}

/// The same of one that borrows, inside another task.
fn sendable<F: Future + Send>(future: F) {
    drop(future);
}

#[tokio::test]
async fn operations_can_be_spawned() {
    // Futures do nothing until they are polled, so nothing here is pulled, read or connected to.
    spawnable(Image::pull("example"));
    spawnable(Image::builder("example").pull());
    spawnable(Image::from_oci_layout("layout"));
    spawnable(Image::from_path("layout"));
    spawnable(Image::from_archive("archive"));
    spawnable(Image::from_archive_reader(tokio::io::empty()));
    spawnable(ImageStore::open("store"));
    spawnable(Vm::start(GuestRoot::erofs("root.erofs"), VmConfig::new()));
    spawnable(ExecBuilder::new("socket").argv(["true"]).spawn());
    spawnable(ExecBuilder::new("socket").argv(["true"]).output());
    spawnable(WorkloadBuilder::new("socket").argv(["true"]).start());
    spawnable(WorkloadBuilder::new("socket").attach());
}

#[test]
fn operations_that_borrow_can_move_between_threads() {
    // Only compiled: what these need exists in a running guest.
    let _ = |image: &Image, vm: &Vm| {
        sendable(image.start(VmConfig::new()));
        sendable(image.boot(VmConfig::new()));
        sendable(image.bake(VmConfig::new()));
        sendable(vm.pause());
        sendable(vm.resume());
        sendable(vm.snapshot("folder"));
        sendable(vm.snapshot_diff("folder"));
        sendable(vm.fork(2));
        sendable(vm.reclaim_memory());
        spawnable(image.pool().build());
        sendable(rootfs::build(image));
        spawnable(rootfs::Builder::new(image).build());
        sendable(vm.exec(["true"]));
        sendable(vm.shutdown());
        sendable(vm.wait());
    };
    let _ = |workload: &Workload| {
        sendable(workload.wait());
        sendable(workload.stop(std::time::Duration::ZERO));
        sendable(workload.signal(1));
        sendable(workload.kill());
    };
    let _ = |pool: &Pool| {
        sendable(pool.acquire());
        sendable(pool.shutdown());
    };
    let _ = |root: &RootImage| sendable(root.write_to("root.erofs"));
    let _ = |store: &ImageStore, options: &ImportOptions| {
        sendable(store.import_path("archive", options));
        sendable(store.import_archive("archive", options));
        sendable(store.import_archive_from(tokio::io::empty(), options));
    };
    let _ = |child: &mut ExecChild| sendable(child.wait());
    let _ = |machine: &mut Machine| sendable(machine.pause());
    let _ = |machine: &mut Machine| sendable(machine.freeze());
    let _ = |baked: &Baked| sendable(baked.start());
    let _ = |machine: &mut Machine, free, deadline| sendable(machine.give_memory_back(free, deadline));
    let _ = |machine: &Machine, snapshot: &Snapshot, engine: &hv::soft::Soft| {
        sendable(machine.save());
        sendable(snapshot.restore(engine, &[]));
    };
}
