//! Time that stands still, and timers.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kiln::hv::Exit;

use crate::rig::{COUNTER, Guest, LONG, SPIN, engine, halting, is_fixed};

#[test]
fn time_stands_still_and_goes_on_without_a_jump() {
    let Some(kvm) = engine("time_stands_still_and_goes_on_without_a_jump") else { return };
    let mut guest = Guest::new(&kvm, &SPIN);
    guest.run_for(Duration::from_millis(2));
    guest.vm.stop_time();
    let still = guest.vm.time_stamp().unwrap();
    assert_eq!(guest.vcpu.save().unwrap().msrs.tsc, still.ticks);
    thread::sleep(Duration::from_millis(300));
    guest.vm.stop_time();
    assert_eq!(guest.vm.time_stamp(), Some(still));
    assert_eq!(guest.vcpu.save().unwrap().msrs.tsc, still.ticks);
    let began = Instant::now();
    guest.vm.start_time();
    guest.vm.start_time();
    let first = guest.vcpu.save().unwrap().msrs.tsc;
    let second = guest.vm.time_stamp().unwrap().ticks;
    let passed = began.elapsed().as_nanos() as u64 * still.hz / 1_000_000_000 + 1_000;
    assert!(still.ticks <= first && first <= second, "{still:?} {first} {second}");
    assert!(second <= still.ticks + passed || is_fixed(&kvm), "{still:?} {second} {passed}");
}

#[test]
fn an_armed_timer_keeps_what_it_had_left_over_a_pause() {
    let Some(kvm) = engine("an_armed_timer_keeps_what_it_had_left_over_a_pause") else { return };
    let period = 400_000_000;
    for deadline in [false, true] {
        let mut guest = halting(&kvm);
        let mut state = guest.vcpu.save().unwrap();
        let hz = guest.vm.time_stamp().unwrap().hz;
        if deadline {
            state.lapic.lvt[0] = 2 << 17 | 0x60;
            state.msrs.tsc = hz;
            state.lapic.tsc_deadline = hz + period * (hz / 1_000) / 1_000_000;
        } else {
            state.lapic.lvt[0] = 0x60;
            (state.lapic.timer_initial, state.lapic.timer_divide) = (period as u32, 0b1011);
        }
        state.lapic.timer_left_ns = Some(period);
        guest.vm.stop_time();
        guest.vcpu.restore(&state).unwrap();
        guest.vm.start_time();
        assert_eq!(guest.run_for(Duration::from_millis(50)), Exit::Kicked);
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(0));
        guest.vm.stop_time();
        let left = guest.vcpu.save().unwrap().lapic.timer_left_ns.expect("armed");
        assert!((1..=period - 50_000_000).contains(&left), "{left}");
        thread::sleep(Duration::from_millis(500));
        assert_eq!(guest.vcpu.save().unwrap().lapic.timer_left_ns, Some(left));
        let began = Instant::now();
        guest.vm.start_time();
        assert_eq!(guest.vcpu.run().unwrap(), Exit::Kicked);
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(1), "the timer's handler");
        assert!(began.elapsed().as_nanos() as u64 + 1_000_000 >= left, "{:?} for {left} ns", began.elapsed());
        let lapic = guest.vcpu.save().unwrap().lapic;
        assert_eq!((lapic.timer_left_ns, lapic.tsc_deadline), (None, 0));
    }
}

#[test]
fn a_timer_that_expires_between_a_run_and_its_saving_is_not_lost() {
    let Some(kvm) = engine("a_timer_that_expires_between_a_run_and_its_saving_is_not_lost") else { return };
    let mut guest = halting(&kvm);
    let mut state = guest.vcpu.save().unwrap();
    state.lapic.lvt[0] = 0x60;
    (state.lapic.timer_initial, state.lapic.timer_divide) = (100_000_000, 0b1011);
    state.lapic.timer_left_ns = Some(100_000_000);
    guest.vcpu.restore(&state).unwrap();
    guest.run_for(Duration::from_millis(10));
    thread::sleep(Duration::from_millis(150));
    guest.vm.stop_time();
    let saved = guest.vcpu.save().unwrap();
    assert_eq!((guest.ram.load::<u64>(COUNTER), saved.lapic.timer_left_ns), (Some(0), Some(0)));
    // Here, and in another machine.
    let mut twin = Guest::on(&kvm, Arc::clone(&guest.ram), 1, &saved);
    guest.vm.start_time();
    for (guest, count) in [(&mut guest, 1), (&mut twin, 2)] {
        assert_eq!(guest.run_for(LONG), Exit::Kicked);
        assert_eq!(guest.ram.load::<u64>(COUNTER), Some(count));
        let left = guest.vcpu.save().unwrap().lapic.timer_left_ns;
        assert_eq!(left, None, "it expires once");
    }
}
