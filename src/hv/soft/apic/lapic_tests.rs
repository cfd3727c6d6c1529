use super::*;
use crate::hv::state::irqchip::IoApicState;
use crate::units::Gsi;

const X2APIC_BASE: u64 = LAPIC_BASE | BASE_ENABLE | BASE_EXTD;

struct Machine {
    clock: Clock,
    ioapic: Arc<IoApic>,
    lapics: Vec<Lapic>,
}

impl Machine {
    /// `vcpus` local APICs after reset.
    fn new(vcpus: u8) -> Self {
        let clock = Clock::manual();
        let ioapic = Arc::new(IoApic::new(Bus::new(vcpus)));
        let lapic = |id| {
            let mailbox = Arc::clone(ioapic.bus().mailbox(id).unwrap());
            Lapic::new(id, mailbox, clock.clone(), Arc::clone(&ioapic))
        };
        let lapics = (0..vcpus.into()).map(lapic).collect();
        Self { clock, ioapic, lapics }
    }

    /// The same in x2APIC form and enabled by software.
    fn x2apic(vcpus: u8) -> Self {
        let mut machine = Self::new(vcpus);
        for lapic in &mut machine.lapics {
            lapic.write_msr(MSR_APIC_BASE, X2APIC_BASE).unwrap();
            lapic.write_msr(0x80f, 0x1ff).unwrap();
        }
        machine
    }
}

fn one() -> (Lapic, Clock) {
    let mut machine = Machine::x2apic(1);
    (machine.lapics.remove(0), machine.clock)
}

/// Takes and ends what is deliverable, highest first.
fn serve(lapic: &mut Lapic) -> Vec<u8> {
    lapic.poll();
    let mut served = Vec::new();
    while let Some(vector) = lapic.deliverable() {
        lapic.accept(vector);
        served.push(vector);
        lapic.end_of_interrupt();
    }
    served
}

#[test]
fn sdm_11_4_7_1_registers_after_reset() {
    let mut machine = Machine::new(2);
    let lapic = &mut machine.lapics[1];
    assert_eq!(lapic.read_msr(0x1b), Some(0xfee0_0800));
    assert_eq!(lapic.mmio_base(), Some(0xfee0_0000));
    for (offset, value) in [
        (0x20, 1 << 24),
        (0x30, 0x0005_0014),
        (0x80, 0),
        (0xa0, 0),
        (0xd0, 0),
        (0xe0, u32::MAX),
        (0xf0, 0xff),
        (0x280, 0),
        (0x300, 0),
        (0x310, 0),
        (0x320, 0x1_0000),
        (0x370, 0x1_0000),
        (0x380, 0),
        (0x390, 0),
        (0x3e0, 0),
    ] {
        assert_eq!(lapic.mmio_read(offset), value, "{offset:#x}");
    }
    assert_eq!(machine.lapics[0].read_msr(0x1b), Some(0xfee0_0900));
}

#[test]
fn sdm_11_4_4_and_11_12_5_transitions_between_forms() {
    let mut machine = Machine::new(1);
    let lapic = &mut machine.lapics[0];
    assert_eq!(lapic.read_msr(0x802), None, "x2APIC registers do not exist in xAPIC form");
    assert_eq!(lapic.write_msr(0x1b, LAPIC_BASE | BASE_EXTD), None, "x2APIC without enable");
    assert_eq!(lapic.write_msr(0x1b, 1 << 40 | BASE_ENABLE), None, "beyond the physical address width");
    assert_eq!(lapic.write_msr(0x1b, LAPIC_BASE | BASE_ENABLE | 1), None, "reserved bit");
    assert_eq!(lapic.write_msr(0x1b, 0x1234_5000 | BASE_ENABLE), Some(()));
    assert_eq!((lapic.mmio_base(), lapic.read_msr(0x1b)), (Some(0x1234_5000), Some(0x1234_5900)));
    assert_eq!(lapic.write_msr(0x1b, X2APIC_BASE), Some(()));
    assert_eq!((lapic.mmio_base(), lapic.read_msr(0x802)), (None, Some(0)));
    assert_eq!(lapic.write_msr(0x1b, LAPIC_BASE | BASE_ENABLE), None, "x2APIC to xAPIC");
    lapic.write_msr(0x808, 0x50).unwrap();
    assert_eq!(lapic.write_msr(0x1b, LAPIC_BASE), Some(()));
    assert_eq!((lapic.mmio_base(), lapic.read_msr(0x802), lapic.tpr()), (None, None, 0));
    assert_eq!(lapic.write_msr(0x1b, X2APIC_BASE), None, "disabled to x2APIC");
    assert_eq!(lapic.write_msr(0x1b, LAPIC_BASE | BASE_ENABLE), Some(()));
}

#[test]
fn sdm_11_12_1_2_x2apic_register_space() {
    let mut machine = Machine::x2apic(2);
    let lapic = &mut machine.lapics[1];
    let readable: Vec<u32> = (0x800..=0x83f).filter(|msr| lapic.read_msr(*msr).is_some()).collect();
    let mut expected = vec![0x802, 0x803, 0x808, 0x80a, 0x80d, 0x80f];
    expected.extend(0x810..=0x828);
    expected.extend([0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x839, 0x83e]);
    assert_eq!(readable, expected);
    let writable: Vec<u32> = (0x800..=0x83f).filter(|msr| lapic.write_msr(*msr, 0).is_some()).collect();
    let expected = [0x808, 0x80b, 0x80f, 0x828, 0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x83e, 0x83f];
    assert_eq!(writable, expected);
    assert_eq!((lapic.read_msr(0x800), lapic.read_msr(0x840), lapic.read_msr(0x8ff)), (None, None, None));
    assert_eq!(lapic.read_msr(0x80d), Some(2), "logical id of APIC 1");
}

#[test]
fn sdm_11_12_1_3_reserved_bits_fault_and_change_nothing() {
    let (mut lapic, _) = one();
    for (msr, value) in [
        (0x808, 0x100),
        (0x808, 1 << 32),
        (0x80b, 1),
        (0x80f, 0x1400),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x830, 1 << 16),
        (0x830, 1 << 20),
        (0x832, 1 << 19),
        (0x832, 1 << 8),
        (0x837, 1 << 17),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        let before = lapic.save();
        assert_eq!(lapic.write_msr(msr, value), None, "{msr:#x} {value:#x}");
        assert_eq!(lapic.save(), before);
    }
}

#[test]
fn sdm_11_8_3_priorities() {
    let (mut lapic, _) = one();
    for vector in [0x31, 0x35, 0x62] {
        lapic.write_msr(0x83f, vector).unwrap();
    }
    assert_eq!(lapic.deliverable(), Some(0x62));
    lapic.accept(0x62);
    assert_eq!((lapic.read_msr(0x80a), lapic.deliverable()), (Some(0x60), None), "in service holds lower classes off");
    lapic.write_msr(0x83f, 0x6f).unwrap();
    assert_eq!(lapic.deliverable(), None, "the same class does not interrupt");
    lapic.write_msr(0x83f, 0x70).unwrap();
    assert_eq!(lapic.deliverable(), Some(0x70));
    lapic.write_msr(0x808, 0x7a).unwrap();
    assert_eq!((lapic.read_msr(0x80a), lapic.deliverable()), (Some(0x7a), None));
    lapic.write_msr(0x808, 0).unwrap();
    lapic.accept(0x70);
    lapic.write_msr(0x80b, 0).unwrap();
    lapic.write_msr(0x80b, 0).unwrap();
    assert_eq!(serve(&mut lapic), [0x6f, 0x35, 0x31]);
}

#[test]
fn sdm_11_8_6_cr8_is_the_tpr_class() {
    let (mut lapic, _) = one();
    lapic.write_msr(0x808, 0x57).unwrap();
    assert_eq!(lapic.tpr(), 5);
    lapic.set_tpr(9);
    assert_eq!(lapic.read_msr(0x808), Some(0x90));
    lapic.write_msr(0x83f, 0x9f).unwrap();
    assert_eq!(lapic.deliverable(), None);
    lapic.set_tpr(8);
    assert_eq!(lapic.deliverable(), Some(0x9f));
}

#[test]
fn sdm_11_8_4_irr_isr_and_tmr_follow_an_interrupt() {
    let (mut lapic, _) = one();
    let bits = |lapic: &mut Lapic| [0x822, 0x812, 0x81a].map(|msr| lapic.read_msr(msr).unwrap());
    lapic.mailbox.post(0x45, true);
    lapic.poll();
    assert_eq!(bits(&mut lapic), [1 << 5, 0, 1 << 5]);
    lapic.accept(0x45);
    assert_eq!(bits(&mut lapic), [0, 1 << 5, 1 << 5]);
    lapic.mailbox.post(0x45, false);
    lapic.poll();
    assert_eq!(bits(&mut lapic), [1 << 5, 1 << 5, 0]);
}

#[test]
fn sdm_11_8_5_eoi_of_a_level_interrupt_reaches_the_ioapic() {
    let machine = &mut Machine::x2apic(1);
    let lapic = &mut machine.lapics[0];
    let mut state = IoApicState::default();
    state.redirections[4] = 0x45 | 1 << 15;
    machine.ioapic.restore(&state);
    let line = machine.ioapic.line(Gsi(4)).unwrap();
    line.set_level(true);
    lapic.poll();
    lapic.accept(0x45);
    line.set_level(false);
    assert_eq!(machine.ioapic.save().redirections[4], 0x45 | 1 << 15 | 1 << 14);
    lapic.write_msr(0x80b, 0).unwrap();
    assert_eq!(machine.ioapic.save().redirections[4], 0x45 | 1 << 15);
    lapic.write_msr(0x80b, 0).unwrap();
    assert_eq!(serve(lapic), [0u8; 0]);
}

#[test]
fn sdm_11_4_7_2_software_disable_masks_the_lvt_and_drops_new_interrupts() {
    let (mut lapic, _) = one();
    lapic.write_msr(0x832, 0x40).unwrap();
    lapic.write_msr(0x83f, 0x33).unwrap();
    lapic.write_msr(0x80f, 0xff).unwrap();
    assert_eq!(lapic.read_msr(0x832), Some(0x1_0040));
    lapic.write_msr(0x832, 0x40).unwrap();
    assert_eq!(lapic.read_msr(0x832), Some(0x1_0040), "the mask stays");
    lapic.mailbox.post(0x44, false);
    lapic.mailbox.post_nmi();
    assert_eq!(serve(&mut lapic), [0x33], "what was requested before is held");
    assert!(lapic.take_signals().nmi);
}

#[test]
fn sdm_11_5_1_timer_interrupts_by_its_lvt_entry() {
    let (mut lapic, clock) = one();
    lapic.write_msr(0x83e, 0b1011).unwrap();
    lapic.write_msr(0x838, 1000).unwrap();
    assert_eq!(lapic.next_deadline_ns(), None, "masked");
    clock.advance(1000);
    assert_eq!(serve(&mut lapic), [0u8; 0]);
    lapic.write_msr(0x832, 0xec | 1 << 17).unwrap();
    lapic.write_msr(0x838, 1000).unwrap();
    assert_eq!(lapic.next_deadline_ns(), Some(2000));
    clock.advance(400);
    assert_eq!((lapic.read_msr(0x839), lapic.read_msr(0x838)), (Some(600), Some(1000)));
    assert_eq!(serve(&mut lapic), [0u8; 0]);
    clock.advance(600);
    assert_eq!(serve(&mut lapic), [0xec]);
    clock.advance(1000);
    assert_eq!(serve(&mut lapic), [0xec]);
}

#[test]
fn sdm_11_5_4_an_expiry_while_masked_is_not_delivered_after_unmasking() {
    let (mut lapic, clock) = one();
    lapic.write_msr(0x832, 0x1_00ec).unwrap();
    lapic.write_msr(0x838, 10).unwrap();
    clock.advance(100);
    lapic.write_msr(0x832, 0xec).unwrap();
    assert_eq!(serve(&mut lapic), [0u8; 0]);
}

#[test]
fn sdm_11_5_4_1_tsc_deadline() {
    let (mut lapic, clock) = one();
    assert_eq!(lapic.write_msr(0x6e0, 5000), Some(()));
    assert_eq!(lapic.read_msr(0x6e0), Some(0), "ignored in the other modes");
    lapic.write_msr(0x832, 0xec | 2 << 17).unwrap();
    clock.set_tsc(4000);
    lapic.write_msr(0x6e0, 5000).unwrap();
    assert_eq!((lapic.next_deadline_ns(), lapic.read_msr(0x6e0)), (Some(1000), Some(5000)));
    clock.advance(999);
    assert_eq!(serve(&mut lapic), [0u8; 0]);
    clock.advance(1);
    assert_eq!(serve(&mut lapic), [0xec]);
    assert_eq!((lapic.next_deadline_ns(), lapic.read_msr(0x6e0)), (None, Some(0)));
}

#[test]
fn sdm_11_5_3_errors() {
    let (mut lapic, _) = one();
    lapic.write_msr(0x837, 0xfe).unwrap();
    lapic.write_msr(0x83f, 0x0f).unwrap();
    assert_eq!(lapic.read_msr(0x828), Some(0), "latched by a write");
    lapic.write_msr(0x828, 0).unwrap();
    assert_eq!(lapic.read_msr(0x828), Some(0x20), "send illegal vector");
    assert_eq!(serve(&mut lapic), [0xfe]);
    lapic.mailbox.post(0x0e, false);
    assert_eq!(serve(&mut lapic), [0xfe]);
    lapic.write_msr(0x828, 0).unwrap();
    assert_eq!(lapic.read_msr(0x828), Some(0x40), "received illegal vector");
    lapic.write_msr(0x837, 0x03).unwrap();
    lapic.write_msr(0x830, 1 << 18).unwrap();
    lapic.write_msr(0x828, 0).unwrap();
    assert_eq!(lapic.read_msr(0x828), Some(0x20));
    lapic.write_msr(0x828, 0).unwrap();
    assert_eq!(lapic.read_msr(0x828), Some(0));
}

#[test]
fn sdm_11_6_1_ipis_between_processors() {
    let mut machine = Machine::x2apic(3);
    let send = |machine: &mut Machine, icr: u64| {
        machine.lapics[1].write_msr(0x830, icr).unwrap();
        let served = machine.lapics.iter_mut().map(serve).collect::<Vec<_>>();
        [served[0].len(), served[1].len(), served[2].len()]
    };
    assert_eq!(send(&mut machine, 2 << 32 | 0x80), [0, 0, 1]);
    assert_eq!(send(&mut machine, 1 << 32 | 0x80), [0, 1, 0]);
    assert_eq!(send(&mut machine, 1 << 18 | 0x80), [0, 1, 0]);
    assert_eq!(send(&mut machine, 2 << 18 | 0x80), [1, 1, 1]);
    assert_eq!(send(&mut machine, 3 << 18 | 0x80), [1, 0, 1]);
    assert_eq!(send(&mut machine, 0xffff_ffff << 32 | 0x80), [1, 1, 1]);
    assert_eq!(send(&mut machine, 0b101 << 32 | 1 << 11 | 0x80), [1, 0, 1], "logical");
    assert_eq!(send(&mut machine, 0b110 << 32 | 1 << 11 | 1 << 8 | 0x80), [0, 1, 0], "lowest priority");
    assert_eq!(send(&mut machine, 9 << 32 | 0x80), [0, 0, 0]);
    assert_eq!(machine.lapics[1].read_msr(0x830), Some(9 << 32 | 0x80));
    assert_eq!(send(&mut machine, 2 << 32 | 0x1080), [0, 0, 1], "a delivery status written back");
    assert_eq!(machine.lapics[1].read_msr(0x830), Some(2 << 32 | 0x80));
}

#[test]
fn sdm_11_6_1_init_sipi_and_nmi_are_recorded() {
    let mut machine = Machine::x2apic(2);
    for icr in [1 << 32 | 0xc500, 1 << 32 | 0x8500, 1 << 32 | 0x4607, 1 << 32 | 0x4400] {
        machine.lapics[0].write_msr(0x830, icr).unwrap();
    }
    machine.lapics[1].poll();
    assert_eq!(machine.lapics[1].take_signals(), Signals { nmi: true, init: true, sipi: Some(7) });
    assert_eq!(machine.lapics[1].take_signals(), Signals::default());
    machine.lapics[0].poll();
    assert_eq!(machine.lapics[0].take_signals(), Signals::default());
    machine.lapics[0].write_msr(0x830, 1 << 32 | 0x8500).unwrap();
    machine.lapics[1].poll();
    assert!(!machine.lapics[1].take_signals().init, "de-assert");
}

#[test]
fn sdm_11_4_1_xapic_registers_by_offset() {
    let mut machine = Machine::new(2);
    let lapic = &mut machine.lapics[0];
    lapic.mmio_write(0xf0, 0x1ff);
    lapic.mmio_write(0x80, 0xffff_ff30);
    assert_eq!((lapic.mmio_read(0x80), lapic.tpr()), (0x30, 3));
    lapic.mmio_write(0xd0, 0x0212_3456);
    lapic.mmio_write(0xe0, 0);
    assert_eq!((lapic.mmio_read(0xd0), lapic.mmio_read(0xe0)), (0x0200_0000, 0x0fff_ffff));
    lapic.mmio_write(0x310, 0x0112_3456);
    lapic.mmio_write(0x300, 0xfff0_0000 | 0x81);
    assert_eq!((lapic.mmio_read(0x310), lapic.mmio_read(0x300)), (0x0100_0000, 0x81));
    lapic.mmio_write(0x320, 0xffff_ffff);
    assert_eq!(lapic.mmio_read(0x320), 0x7_00ff);
    for read_only in [0x20, 0x30, 0xa0, 0x100, 0x200, 0x390] {
        let before = lapic.mmio_read(read_only);
        lapic.mmio_write(read_only, 0xffff_ffff);
        assert_eq!(lapic.mmio_read(read_only), before, "{read_only:#x}");
    }
    assert_eq!(lapic.mmio_read(0x84), 0);
    lapic.mmio_read(0x3f0);
    lapic.mmio_write(0x280, 0);
    assert_eq!(lapic.mmio_read(0x280), 0x80, "illegal register address");
    let other = &mut machine.lapics[1];
    other.mmio_write(0xf0, 0x1ff);
    assert_eq!(serve(other), [0x81]);
    machine.lapics[0].mmio_write(0x300, 0x82);
    assert_eq!(serve(&mut machine.lapics[1]), [0x82]);
}

#[test]
fn sdm_11_6_2_2_xapic_logical_destinations_by_ldr_and_dfr() {
    let mut machine = Machine::new(2);
    for (lapic, ldr) in machine.lapics.iter_mut().zip([1, 2]) {
        lapic.mmio_write(0xf0, 0x1ff);
        lapic.mmio_write(0xd0, ldr << 24);
    }
    machine.lapics[0].mmio_write(0x310, 2 << 24);
    machine.lapics[0].mmio_write(0x300, 0x90 | 1 << 11);
    assert_eq!(machine.lapics.iter_mut().map(serve).collect::<Vec<_>>(), [vec![], vec![0x90]]);
    machine.lapics[1].mmio_write(0xe0, 0);
    machine.lapics[1].mmio_write(0xd0, 0x31 << 24);
    machine.lapics[0].mmio_write(0x310, 0x31 << 24);
    machine.lapics[0].mmio_write(0x300, 0x90 | 1 << 11);
    assert_eq!(machine.lapics.iter_mut().map(serve).collect::<Vec<_>>(), [vec![0x90], vec![0x90]]);
}

#[test]
fn a_restored_lapic_continues() {
    let (mut lapic, clock) = one();
    lapic.write_msr(0x832, 0xec | 1 << 17).unwrap();
    lapic.write_msr(0x83e, 0b1011).unwrap();
    lapic.write_msr(0x838, 1000).unwrap();
    lapic.write_msr(0x808, 0x20).unwrap();
    lapic.write_msr(0x830, 5 << 32 | 0x99).unwrap();
    lapic.write_msr(0x83f, 0x55).unwrap();
    lapic.accept(0x55);
    lapic.mailbox.post(0x66, true);
    clock.advance(300);
    let saved = lapic.save();
    assert_eq!((saved.timer_left_ns, saved.irr[3]), (Some(700), 1 << 6));
    let (mut other, clock) = one();
    clock.advance(50_000);
    other.restore(&saved).unwrap();
    assert_eq!(other.save(), saved);
    assert_eq!(other.next_deadline_ns(), Some(50_700));
    clock.advance(700);
    assert_eq!(serve(&mut other), [0xec, 0x66]);
    assert_eq!(other.next_deadline_ns(), Some(51_700));
}

#[test]
fn a_restored_tsc_deadline_is_the_tscs_not_the_hosts() {
    let (mut lapic, clock) = one();
    lapic.write_msr(0x832, 0xec | 2 << 17).unwrap();
    lapic.write_msr(0x6e0, 10_000).unwrap();
    clock.advance(9_000);
    let saved = lapic.save();
    let (mut other, clock) = one();
    other.restore(&saved).unwrap();
    clock.set_tsc(9_000);
    assert_eq!(other.next_deadline_ns(), Some(1_000));
}

#[test]
fn impossible_states_are_refused_or_cleaned() {
    let (mut lapic, clock) = one();
    let good = lapic.save();
    for bad in [
        LapicState { apic_base: LAPIC_BASE | BASE_EXTD, ..good },
        LapicState { apic_base: u64::MAX, ..good },
        LapicState { id: 3, ..good },
    ] {
        assert!(lapic.restore(&bad).is_err());
        assert_eq!(lapic.save(), good);
    }
    let hostile = LapicState {
        lvt: [u32::MAX, u32::MAX, u32::MAX, u32::MAX, u32::MAX, 0],
        irr: [u32::MAX; 8],
        isr: [u32::MAX; 8],
        timer_divide: u32::MAX,
        timer_initial: 0,
        timer_left_ns: Some(u64::MAX),
        icr: u64::MAX,
        tpr: u32::MAX,
        ..good
    };
    for lvt in [1 << 17, 2 << 17, 3 << 17, 0] {
        lapic.restore(&LapicState { lvt: [lvt, 0, 0, 0, 0, 0], timer_left_ns: Some(0), ..hostile }).unwrap();
        clock.advance(1);
        lapic.poll();
        lapic.save();
    }
    lapic.restore(&hostile).unwrap();
    assert_eq!(lapic.save().irr[0], 0xffff_0000);
    assert_eq!(lapic.deliverable(), None);
}
