//! Running guest code: accesses, exits, and the processor that guests find.

use std::num::NonZeroU8;
use std::sync::{Arc, OnceLock};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::kvm::{Kvm, Profile};
use kiln::hv::soft::Soft;
use kiln::hv::state::VcpuState;
use kiln::hv::state::x86_64::Events;
use kiln::hv::{Exit, HvError, Hypervisor, IoHandler, Kick, VmSpec};
use kiln::units::{GuestAddr, VcpuId};

use crate::bare;
use crate::bare::{CODE, EXIT_PORT};
use crate::rig::{
    Access, COUNTER, Guest, LONG, Recorder, SPIN, add_handler, engine, is_fixed, memory, raw, with_interrupts,
};

fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    raw(|a| {
        build(a)?;
        a.mov(dx, u32::from(EXIT_PORT))?;
        a.out(dx, al)?;
        a.hlt()
    })
}

#[test]
fn profiles_say_what_they_show_or_what_is_missing() {
    let Some(kvm) = engine("profiles_say_what_they_show_or_what_is_missing") else { return };
    let host = Kvm::with_profile(Profile::Host).unwrap();
    assert!(host.cpu_profile().starts_with("host-"), "{}", host.cpu_profile());
    assert_eq!(host.cpu_profile(), Kvm::with_profile(Profile::Host).unwrap().cpu_profile());
    match Kvm::with_profile(Profile::Baseline) {
        Ok(baseline) => {
            assert!(baseline.cpu_profile().starts_with(Soft::new().cpu_profile()));
            assert_eq!(kvm.cpu_profile(), baseline.cpu_profile());
        }
        Err(HvError::Missing { what }) => {
            assert!(!what.is_empty());
            assert_eq!(kvm.cpu_profile(), host.cpu_profile());
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_guest_runs_and_leaves() {
    let Some(kvm) = engine("a_guest_runs_and_leaves") else { return };
    let code = assemble(|a| {
        a.mov(rax, 6u64)?;
        a.mov(rbx, 7u64)?;
        a.imul_2(rbx, rax)
    });
    let mut guest = Guest::new(&kvm, &code);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let state = guest.vcpu.save().unwrap();
    assert_eq!(state.gpr[3], 42);
    assert_eq!(state.rip, CODE + code.len() as u64 - 1, "past the port, before the halt");
}

#[test]
fn ports_are_served_at_each_width() {
    let Some(kvm) = engine("ports_are_served_at_each_width") else { return };
    let code = assemble(|a| {
        a.mov(dx, 0x300)?;
        a.mov(eax, 0x1122_3344)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.mov(rax, u64::MAX)?;
        a.in_(al, dx)?;
        a.mov(rbx, rax)?;
        a.in_(ax, dx)?;
        a.mov(rcx, rax)?;
        a.in_(eax, dx)?;
        a.mov(rsi, rax)
    });
    let mut guest = Guest::new(&kvm, &code);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let out = |bytes: &[u8]| Access::Out(0x300, bytes.to_vec());
    let expected = [
        out(&[0x44]),
        out(&[0x44, 0x33]),
        out(&[0x44, 0x33, 0x22, 0x11]),
        Access::In(0x300, 1),
        Access::In(0x300, 2),
        Access::In(0x300, 4),
    ];
    assert_eq!(guest.io.take(), expected);
    let state = guest.vcpu.save().unwrap();
    assert_eq!(
        [3, 1, 6].map(|register| state.gpr[register]),
        [0xffff_ffff_ffff_ffa1, 0xffff_ffff_ffff_a2a1, 0xa4a3_a2a1]
    );
}

#[test]
fn string_ports_move_one_element_at_a_time() {
    let Some(kvm) = engine("string_ports_move_one_element_at_a_time") else { return };
    let code = assemble(|a| {
        a.cld()?;
        a.mov(dx, 0x300)?;
        a.mov(rsi, COUNTER)?;
        a.mov(ecx, 3)?;
        a.rep().outsw()?;
        a.mov(rdi, COUNTER + 0x100)?;
        a.mov(ecx, 2)?;
        a.rep().insd()
    });
    let mut guest = Guest::new(&kvm, &code);
    guest.ram.store(COUNTER, 0x6655_4433_2211u64).unwrap();
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let out = |bytes: &[u8]| Access::Out(0x300, bytes.to_vec());
    let expected =
        [out(&[0x11, 0x22]), out(&[0x33, 0x44]), out(&[0x55, 0x66]), Access::In(0x300, 4), Access::In(0x300, 4)];
    assert_eq!(guest.io.take(), expected);
    assert_eq!(guest.ram.load::<u64>(COUNTER + 0x100), Some(0xa4a3_a2a1_a4a3_a2a1));
    let state = guest.vcpu.save().unwrap();
    assert_eq!((state.gpr[1], state.gpr[6], state.gpr[7]), (0, COUNTER + 6, COUNTER + 0x108));
}

#[test]
fn memory_that_is_not_ram_is_served_at_each_width() {
    let Some(kvm) = engine("memory_that_is_not_ram_is_served_at_each_width") else { return };
    let code = assemble(|a| {
        a.mov(rbx, 0xd000_0000u64)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(byte_ptr(rbx), al)?;
        a.mov(word_ptr(rbx + 2), ax)?;
        a.mov(dword_ptr(rbx + 4), eax)?;
        a.mov(qword_ptr(rbx + 8), rax)?;
        a.xor(ecx, ecx)?;
        a.mov(cl, byte_ptr(rbx))?;
        a.mov(esi, dword_ptr(rbx + 4))?;
        a.mov(rdi, qword_ptr(rbx + 8))?;
        a.movzx(ebp, word_ptr(rbx + 2))
    });
    let mut guest = Guest::new(&kvm, &code);
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    let wrote = |at: u64, bytes: &[u8]| Access::Write(0xd000_0000 + at, bytes.to_vec());
    let read = |at: u64, len| Access::Read(0xd000_0000 + at, len);
    let expected = [
        wrote(0, &[0x88]),
        wrote(2, &[0x88, 0x77]),
        wrote(4, &[0x88, 0x77, 0x66, 0x55]),
        wrote(8, &[0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]),
        read(0, 1),
        read(4, 4),
        read(8, 8),
        read(2, 2),
    ];
    assert_eq!(guest.io.take(), expected);
    let state = guest.vcpu.save().unwrap();
    let read = [1, 5, 6, 7].map(|register| state.gpr[register]);
    assert_eq!(read, [0xa1, 0xa2a1, 0xa4a3_a2a1, 0xa8a7_a6a5_a4a3_a2a1]);
}

#[test]
fn an_access_is_complete_before_the_state_is_saved() {
    let Some(kvm) = engine("an_access_is_complete_before_the_state_is_saved") else { return };
    // The handler kicks in the middle of an IN, so that the run ends before the guest has the answer.
    #[derive(Debug)]
    struct KickOnIn(Arc<OnceLock<Arc<dyn Kick>>>);
    impl IoHandler for KickOnIn {
        fn mmio_read(&mut self, _: GuestAddr, _: &mut [u8]) {}
        fn mmio_write(&mut self, _: GuestAddr, _: &[u8]) {}
        fn pio_in(&mut self, _: u16, data: &mut [u8]) {
            data.fill(0x5a);
            self.0.get().unwrap().kick();
        }
        fn pio_out(&mut self, _: u16, _: &[u8]) {}
    }
    let code = raw(|a| {
        a.in_(al, 0x77)?;
        a.hlt()
    });
    let ram = memory(&code);
    let vm = kvm.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, ram).unwrap();
    let seed = vm.create_vcpu(VcpuId(0)).unwrap();
    let kick = Arc::new(OnceLock::from(seed.kicker()));
    let mut vcpu = seed.bind(Box::new(KickOnIn(kick))).unwrap();
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    let state = vcpu.save().unwrap();
    assert_eq!((state.gpr[0], state.rip), (0x5a, CODE + 2));
    // And a state that is put in its stead is not written to by the old one's access.
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Kicked);
    vcpu.restore(&VcpuState { rip: CODE + 0x100, ..bare::initial_state() }).unwrap();
    let state = vcpu.save().unwrap();
    assert_eq!((state.gpr[0], state.rip), (0, CODE + 0x100));
}

#[test]
fn a_triple_fault_is_a_shutdown() {
    let Some(kvm) = engine("a_triple_fault_is_a_shutdown") else { return };
    // No interrupt table, and an undefined instruction.
    let mut guest = Guest::new(&kvm, &[0x0f, 0x0b]);
    match guest.vcpu.run() {
        Ok(exit) => assert_eq!(exit, Exit::Shutdown),
        // A kernel that emulates the guest's kernel mode may know no such instruction.
        Err(HvError::Unimplemented { rip, bytes, .. }) => {
            assert_eq!((rip, bytes.get(..2)), (CODE, Some(&[0x0f, 0x0b][..])));
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_the_host_cannot_execute_is_named_and_nothing_has_happened() {
    let Some(kvm) = engine("what_the_host_cannot_execute_is_named_and_nothing_has_happened") else { return };
    // A vector load from a device, which KVM's emulator lacks on every host (VMOVDQU ymm0, [rbx]).
    let code = raw(|a| {
        a.mov(rbx, 0xd000_0000u64)?;
        a.db(&[0xc5, 0xfe, 0x6f, 0x03])
    });
    let mut guest = Guest::new(&kvm, &code);
    let at = CODE + code.len() as u64 - 4;
    match guest.vcpu.run() {
        Err(HvError::Unimplemented { rip, bytes, .. }) => {
            assert_eq!((rip, bytes.get(..4)), (at, Some(&[0xc5, 0xfe, 0x6f, 0x03][..])));
            let state = guest.vcpu.save().unwrap();
            assert_eq!((state.rip, state.events), (at, Events::default()));
        }
        // Without AVX it is an undefined instruction, of which there is no handler here.
        Ok(exit) => assert_eq!(exit, Exit::Shutdown),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_guest_finds_its_processor_and_no_registers_that_are_not_saved() {
    let Some(kvm) = engine("a_guest_finds_its_processor_and_no_registers_that_are_not_saved") else { return };
    let code = raw(|a| {
        a.mov(rsi, COUNTER + 0x100)?;
        for (leaf, at) in [(0x4000_0000u32, 0), (1, 16), (0x15, 32), (0xb, 48)] {
            a.mov(eax, leaf)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.mov(dword_ptr(rsi + at), eax)?;
            a.mov(dword_ptr(rsi + at + 4), ebx)?;
            a.mov(dword_ptr(rsi + at + 8), ecx)?;
            a.mov(dword_ptr(rsi + at + 12), edx)?;
        }
        // IA32_DEBUGCTL, which processors have and states do not.
        a.mov(ecx, 0x1d9)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.hlt()
    });
    let ram = memory(&code);
    add_handler(&ram);
    let state = with_interrupts(&ram);
    let mut guest = Guest::on(&kvm, ram, 1, &state);
    assert_eq!(guest.run_for(LONG), Exit::Kicked);
    let word = |leaf: u64, register: u64| guest.ram.load::<u32>(COUNTER + 0x100 + leaf * 16 + register * 4).unwrap();
    let signature: Vec<u8> = (1..4).flat_map(|register| word(0, register).to_le_bytes()).collect();
    assert_eq!(&signature, b"KVMKVMKVM\0\0\0");
    let (identity, features) = (word(1, 1), word(1, 2));
    assert_eq!((identity >> 24, features >> 31), (0, 1), "APIC id, and under a hypervisor");
    // A KVM that works without the processor's help may show features of its own, whatever it was told.
    assert!(features & (1 << 26 | 1 << 28) == 0 || is_fixed(&kvm), "XSAVE or AVX in {features:#x}");
    let hz = u64::from(word(2, 2)) * u64::from(word(2, 1)) / u64::from(word(2, 0));
    let told = guest.vm.time_stamp().unwrap().hz;
    assert!(hz.abs_diff(told) <= 500_000, "{hz} {told}");
    assert_eq!((word(3, 1), word(3, 3)), (1, 0));
    assert_eq!(guest.ram.load::<u64>(COUNTER), Some(1), "a general protection fault");
}

#[test]
fn a_doorbell_rings_without_the_handler() {
    let Some(kvm) = engine("a_doorbell_rings_without_the_handler") else { return };
    let code = assemble(|a| {
        a.mov(rbx, 0xd000_0050u64)?;
        a.mov(dword_ptr(rbx), 7)?;
        a.mov(dword_ptr(rbx), 8)?;
        a.mov(dword_ptr(rbx + 4), 9)
    });
    let mut guest = Guest::new(&kvm, &code);
    let bell = guest.vm.doorbell(GuestAddr(0xd000_0050)).unwrap().expect("KVM has doorbells");
    assert!(guest.vm.doorbell(GuestAddr(0xd000_0050)).is_err(), "once an address");
    let mut count = [0; 8];
    assert!(rustix::io::read(&bell, &mut count).is_err(), "nobody has rung");
    assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
    assert_eq!(guest.io.take(), [Access::Write(0xd000_0054, vec![9, 0, 0, 0])]);
    assert_eq!(rustix::io::read(&bell, &mut count), Ok(8));
    assert_eq!(u64::from_ne_bytes(count), 2);
}

#[test]
fn a_vcpu_is_made_once_and_only_inside_the_machine() {
    let Some(kvm) = engine("a_vcpu_is_made_once_and_only_inside_the_machine") else { return };
    let vm = kvm.create_vm(&VmSpec { vcpus: NonZeroU8::MIN }, memory(&SPIN)).unwrap();
    let seed = vm.create_vcpu(VcpuId(0)).unwrap();
    for id in [0, 1, 255] {
        assert!(matches!(vm.create_vcpu(VcpuId(id)), Err(HvError::Unsupported(_))), "{id}");
    }
    // A vCPU may outlive its machine.
    drop(vm);
    let mut vcpu = seed.bind(Box::new(Recorder::default())).unwrap();
    vcpu.restore(&bare::initial_state()).unwrap();
    assert_eq!(vcpu.save().unwrap().rip, CODE);
}
