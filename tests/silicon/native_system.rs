//! The reference in any state: all of it is set before a program and read after it.

use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::{Msrs, Segment, Table};
use kiln::mem::GuestRam;
use kvm_bindings::{Msrs as MsrList, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuExit;

use crate::native::Native;
use crate::system::System;

/// MSRs by number and place, but EFER, which is among the special registers.
fn msrs(msrs: &mut Msrs) -> [(u32, &mut u64); 10] {
    [
        (0xc000_0081, &mut msrs.star),
        (0xc000_0082, &mut msrs.lstar),
        (0xc000_0083, &mut msrs.cstar),
        (0xc000_0084, &mut msrs.sfmask),
        (0xc000_0102, &mut msrs.kernel_gs_base),
        (0xc000_0103, &mut msrs.tsc_aux),
        (0x174, &mut msrs.sysenter_cs),
        (0x175, &mut msrs.sysenter_esp),
        (0x176, &mut msrs.sysenter_eip),
        (0x277, &mut msrs.pat),
    ]
}

impl System for Native {
    fn memory(&self) -> &GuestRam {
        &self.ram
    }

    fn run_system(&mut self, state: &VcpuState) -> Result<Option<(u16, VcpuState)>, String> {
        self.set(state).map_err(|error| format!("setting the state: {error}"))?;
        let port = loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoIn(_, data)) => data.fill(0xff),
                Ok(VcpuExit::IoOut(port, _)) => break port,
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::InternalError | VcpuExit::Shutdown) => return Ok(None),
                Ok(other) => return Err(format!("unexpected exit {other:?}")),
                Err(error) if error.errno() == 4 => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        };
        let state = self.get(state).map_err(|error| format!("reading the state: {error}"))?;
        Ok(Some((port, state)))
    }
}

impl Native {
    fn set(&mut self, state: &VcpuState) -> Result<(), kvm_ioctls::Error> {
        // Nothing of the last program may wait: neither an exception nor the rest of an instruction.
        let events = kvm_bindings::kvm_vcpu_events::default();
        self.vcpu.set_vcpu_events(&events)?;
        let reset = self.vcpu.get_sregs()?;
        self.vcpu.set_sregs(&to_sregs(state, reset))?;
        self.vcpu.set_regs(&to_regs(state))?;
        // Without interrupt controllers in the kernel, KVM_RUN takes it from here.
        self.vcpu.get_kvm_run().cr8 = state.cr8;
        let [d0, d1, d2, d3, dr6, dr7] = state.dr;
        self.vcpu.set_debug_regs(&kvm_debugregs { db: [d0, d1, d2, d3], dr6, dr7, ..Default::default() })?;
        let mut copy = state.msrs;
        let entries = msrs(&mut copy).map(|(index, data)| kvm_msr_entry { index, data: *data, ..Default::default() });
        let list = MsrList::from_entries(&entries).expect("ten entries fit");
        self.vcpu.set_msrs(&list)?;
        Ok(())
    }

    fn get(&mut self, began: &VcpuState) -> Result<VcpuState, kvm_ioctls::Error> {
        let (regs, sregs) = (self.vcpu.get_regs()?, self.vcpu.get_sregs()?);
        let debug = self.vcpu.get_debug_regs()?;
        let mut state = from_sregs(&sregs, began.clone());
        state.gpr = from_regs(&regs);
        state.rflags = regs.rflags;
        state.dr = [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7];
        let entries = msrs(&mut state.msrs).map(|(index, _)| kvm_msr_entry { index, ..Default::default() });
        let mut list = MsrList::from_entries(&entries).expect("ten entries fit");
        self.vcpu.get_msrs(&mut list)?;
        for ((_, place), entry) in msrs(&mut state.msrs).into_iter().zip(list.as_slice()) {
            *place = entry.data;
        }
        Ok(state)
    }
}

fn to_regs(state: &VcpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn from_regs(r: &kvm_regs) -> [u64; 16] {
    [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15]
}

fn to_segment(from: &Segment) -> kvm_segment {
    let bit = |n: u32| (from.attributes >> n & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.attributes & 15) as u8,
        s: bit(4),
        dpl: (from.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: from.unusable.into(),
        padding: 0,
    }
}

fn from_segment(from: &kvm_segment) -> Segment {
    let bits =
        [(from.s, 4), (from.dpl, 5), (from.present, 7), (from.avl, 12), (from.l, 13), (from.db, 14), (from.g, 15)];
    let attributes = bits.into_iter().fold(u16::from(from.type_), |all, (value, at)| all | u16::from(value) << at);
    let unusable = from.unusable != 0 || from.present == 0;
    Segment { selector: from.selector, base: from.base, limit: from.limit, attributes, unusable }
}

fn to_sregs(state: &VcpuState, reset: kvm_sregs) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(to_segment);
    let table = |table: &Table| kvm_dtable { base: table.base, limit: table.limit, ..Default::default() };
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: to_segment(&state.tr),
        ldt: to_segment(&state.ldtr),
        gdt: table(&state.gdtr),
        idt: table(&state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.msrs.efer,
        interrupt_bitmap: [0; 4],
        ..reset
    }
}

fn from_sregs(sregs: &kvm_sregs, began: VcpuState) -> VcpuState {
    let table = |table: &kvm_dtable| Table { base: table.base, limit: table.limit };
    VcpuState {
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        segments: [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(from_segment),
        ldtr: from_segment(&sregs.ldt),
        tr: from_segment(&sregs.tr),
        gdtr: table(&sregs.gdt),
        idtr: table(&sregs.idt),
        msrs: Msrs { efer: sregs.efer, ..began.msrs },
        ..began
    }
}
