//! The reference: guest user mode under `/dev/kvm`, which runs on the host's silicon.
#![allow(unsafe_code, reason = "KVM is given the address of guest memory, and XSAVE images of a size it must know")]

use kiln::hv::state::x86_64::Fpu;
use kiln::mem::GuestRam;
use kiln::units::Bytes;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_xsave};
use kvm_ioctls::{Cap, Kvm, SyncReg, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use crate::machine;
use crate::outcome::{Processor, Stopped};
use crate::sequence::Start;

const XSAVE_HEADER: usize = 512 / 4;
const XSTATE_X87_SSE: u32 = 3;

/// A virtual machine with one vCPU.
#[derive(Debug)]
pub(crate) struct Native {
    // Dropped in this order: the machine before the memory it maps.
    vcpu: VcpuFd,
    _vm: VmFd,
    ram: GuestRam,
    user: kvm_sregs,
}

impl Native {
    /// `Err` says why there is no such machine here.
    pub(crate) fn new() -> Result<Self, String> {
        let fail = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
        let kvm = Kvm::new().map_err(fail("opening /dev/kvm"))?;
        if !kvm.check_extension(Cap::SyncRegs) {
            return Err("KVM without KVM_CAP_SYNC_REGS".to_owned());
        }
        let vm = kvm.create_vm().map_err(fail("KVM_CREATE_VM"))?;
        let ram = GuestRam::new(Bytes(machine::RAM_BYTES)).map_err(|error| error.to_string())?;
        machine::build(&ram);
        let host = ram.memory().get_host_address(GuestAddress(0)).map_err(|error| error.to_string())?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: machine::RAM_BYTES,
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping of `ram` is RAM_BYTES long from `host`, and outlives the machine: `Native` drops
        // `_vm` and `vcpu` first.
        unsafe { vm.set_user_memory_region(region) }.map_err(fail("KVM_SET_USER_MEMORY_REGION"))?;
        let mut vcpu = vm.create_vcpu(0).map_err(fail("KVM_CREATE_VCPU"))?;
        let user = user_mode(vcpu.get_sregs().map_err(fail("KVM_GET_SREGS"))?);
        vcpu.set_sync_valid_reg(SyncReg::Register);
        vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        Ok(Self { vcpu, _vm: vm, ram, user })
    }
}

impl Processor for Native {
    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn run(&mut self, start: &Start) -> Result<Stopped, String> {
        let xsave = to_xsave(&start.fpu);
        // SAFETY: the machine has no dynamically enabled state component, so `kvm_xsave` is as large as KVM reads.
        unsafe { self.vcpu.set_xsave(&xsave) }.map_err(|error| format!("KVM_SET_XSAVE: {error}"))?;
        let sync = self.vcpu.sync_regs_mut();
        sync.regs = to_regs(start);
        sync.sregs = self.user;
        self.vcpu.set_sync_dirty_reg(SyncReg::Register);
        self.vcpu.set_sync_dirty_reg(SyncReg::SystemRegister);
        let vector = loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) => break port as u8,
                Ok(VcpuExit::Intr) => {}
                Ok(other) => return Err(format!("unexpected exit {other:?}")),
                Err(error) if error.errno() == 4 => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        };
        let sync = self.vcpu.sync_regs();
        let xsave = self.vcpu.get_xsave().map_err(|error| format!("KVM_GET_XSAVE: {error}"))?;
        Ok(Stopped { vector, gpr: from_regs(&sync.regs), cr2: sync.sregs.cr2, fpu: from_xsave(&xsave) })
    }
}

fn segment(selector: u16, type_: u8, long: bool, user: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: if user { 3 } else { 0 },
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn user_mode(reset: kvm_sregs) -> kvm_sregs {
    let data = segment(machine::USER_SS, 3, false, true);
    kvm_sregs {
        cs: segment(machine::USER_CS, 11, true, true),
        ss: data,
        ds: data,
        es: data,
        fs: kvm_segment { base: machine::FS_BASE, ..data },
        gs: kvm_segment { base: machine::GS_BASE, ..data },
        tr: kvm_segment {
            base: machine::TSS,
            limit: machine::TSS_LIMIT,
            selector: machine::TSS_SELECTOR,
            type_: 11,
            present: 1,
            ..Default::default()
        },
        ldt: kvm_segment { unusable: 1, ..Default::default() },
        gdt: kvm_dtable { base: machine::GDT, limit: machine::GDT_LIMIT, ..Default::default() },
        idt: kvm_dtable { base: machine::IDT, limit: machine::IDT_LIMIT, ..Default::default() },
        cr0: machine::CR0,
        cr2: 0,
        cr3: machine::PML4,
        cr4: machine::CR4,
        efer: machine::EFER,
        ..reset
    }
}

fn to_regs(start: &Start) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = start.gpr;
    let (rip, rflags) = (machine::CODE, start.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn from_regs(r: &kvm_regs) -> [u64; 16] {
    [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]
}

/// The image's words (SDM volume 1, 10.5.1 and 13.4).
fn to_xsave(fpu: &Fpu) -> kvm_xsave {
    let mut xsave = kvm_xsave::default();
    let words = &mut xsave.region;
    words[0] = u32::from(fpu.fcw) | u32::from(fpu.fsw) << 16;
    words[1] = fpu.ftw.into();
    words[6] = fpu.mxcsr;
    let mut put = |word: usize, value: u64| {
        words[word] = value as u32;
        words[word + 1] = (value >> 32) as u32;
    };
    for (index, (low, high)) in fpu.st.iter().enumerate() {
        put(8 + index * 4, *low);
        put(10 + index * 4, (*high).into());
    }
    for (index, [low, high]) in fpu.xmm.iter().enumerate() {
        put(40 + index * 4, *low);
        put(42 + index * 4, *high);
    }
    words[XSAVE_HEADER] = XSTATE_X87_SSE;
    xsave
}

fn from_xsave(xsave: &kvm_xsave) -> Fpu {
    let words = &xsave.region;
    let get = |word: usize| u64::from(words[word]) | u64::from(words[word + 1]) << 32;
    Fpu {
        fcw: words[0] as u16,
        fsw: (words[0] >> 16) as u16,
        ftw: words[1] as u8,
        fop: 0,
        fip: 0,
        fdp: 0,
        st: std::array::from_fn(|index| (get(8 + index * 4), words[10 + index * 4] as u16)),
        mxcsr: words[6],
        xmm: std::array::from_fn(|index| [get(40 + index * 4), get(42 + index * 4)]),
    }
}
