//! Guests of one memory image begin with the code that others have decoded: it must never be other code than what their
//! own memory holds.

#[path = "support/bare.rs"]
mod bare;

use bare::{Bare, CODE, EXIT_PORT};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use kiln::hv::soft::Soft;
use kiln::mem::{GuestRam, MemoryImage};
use kiln::units::Bytes;
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes as _, GuestAddress};

const MEMORY: Bytes = Bytes::mib(4);
/// Where the guest leaves the sum of a round.
const SUM: u64 = 0x8008;
/// What the guest writes over the number of block [`PATCHED`] once the sum is made, unless it is 0.
const NUMBER: u64 = 0x8000;
/// Enough blocks of two operations each that processors share them from the second guest on, on some ten pages.
const BLOCKS: u64 = 5000;
const PATCHED: u64 = 2500;

/// The number of a block: an immediate that is nowhere else.
fn number(block: u64) -> u32 {
    0x1000_0000 + block as u32
}

fn sum_with(patched: u32) -> u64 {
    let all: u32 = (0..BLOCKS).map(|n| if n == PATCHED { patched } else { number(n) }).fold(0, u32::wrapping_add);
    all.into()
}

/// Adds up the numbers of all blocks, overwrites one of them if it is told to, leaves by the exit port, and begins
/// anew.
fn build(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut top, mut unpatched, mut patched) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut top)?;
    a.xor(ebx, ebx)?;
    for block in 0..BLOCKS {
        if block == PATCHED {
            a.set_label(&mut patched)?;
        }
        a.add(ebx, number(block))?;
        let mut next = a.create_label();
        a.jmp(next)?;
        a.set_label(&mut next)?;
        a.nop()?;
    }
    a.mov(eax, dword_ptr(NUMBER))?;
    a.test(eax, eax)?;
    a.je(unpatched)?;
    a.lea(rdi, ptr(patched))?;
    a.mov(dword_ptr(rdi + 2), eax)?;
    a.set_label(&mut unpatched)?;
    a.mov(dword_ptr(SUM), ebx)?;
    a.mov(edx, u32::from(EXIT_PORT))?;
    a.out(dx, al)?;
    a.jmp(top)
}

/// Memory with the program, and where in it the number of [`PATCHED`] is.
fn image() -> (MemoryImage, u64) {
    let mut a = CodeAssembler::new(64).expect("a 64-bit assembler");
    build(&mut a).expect("the program assembles");
    let code = a.assemble(CODE).expect("the program encodes");
    let at = code.windows(4).position(|bytes| bytes == number(PATCHED).to_le_bytes()).expect("its number is in it");
    let ram = GuestRam::new(MEMORY).expect("guest memory");
    bare::map_first_gib(&ram);
    let file: File = tempfile::tempfile().expect("a file");
    file.set_len(MEMORY.0).expect("sized");
    let mut tables = vec![0; CODE as usize];
    ram.read_bytes(0, &mut tables).expect("in memory");
    file.write_all_at(&tables, 0).expect("written");
    file.write_all_at(&code, CODE).expect("written");
    (MemoryImage::new(file, MEMORY, [7; 32]), CODE + at as u64)
}

/// Guests of one image and one engine, of which the first has run.
struct Guests {
    engine: Soft,
    image: MemoryImage,
    /// Where the number of [`PATCHED`] is.
    at: u64,
}

impl Guests {
    fn new() -> Self {
        let (image, at) = image();
        let guests = Self { engine: Soft::new(), image, at };
        assert_eq!(sum(&mut guests.enter(|_| ())), sum_with(number(PATCHED)));
        guests
    }

    /// A guest whose memory is changed before it runs.
    fn enter(&self, change: impl FnOnce(&GuestRam)) -> Bare {
        let ram = self.image.map().expect("mapped");
        change(&ram);
        Bare::enter(&self.engine, ram)
    }
}

/// Runs the guest to the end of a round, and a little into the next, far from [`PATCHED`].
fn sum(guest: &mut Bare) -> u64 {
    guest.run().expect("the guest runs");
    guest.ram.load::<u32>(SUM).expect("in memory").into()
}

#[test]
fn the_second_guest_and_the_tenth_do_what_the_first_did() {
    let guests = Guests::new();
    for _ in 0..9 {
        let mut guest = guests.enter(|_| ());
        assert_eq!([(); 3].map(|()| sum(&mut guest)), [sum_with(number(PATCHED)); 3]);
    }
}

#[test]
fn a_guest_with_other_code_in_its_memory_runs_that() {
    let guests = Guests::new();
    let mut guest = guests.enter(|ram| ram.store(guests.at, 5u32).expect("in memory"));
    assert_eq!([sum(&mut guest), sum(&mut guest)], [sum_with(5); 2]);
    assert_eq!(sum(&mut guests.enter(|_| ())), sum_with(number(PATCHED)), "the others do not");
}

#[test]
fn a_guest_that_patches_its_code_runs_the_patched_code() {
    let guests = Guests::new();
    let mut guest = guests.enter(|ram| ram.store(NUMBER, 6u32).expect("in memory"));
    assert_eq!([(); 3].map(|()| sum(&mut guest)), [sum_with(number(PATCHED)), sum_with(6), sum_with(6)]);
    guest.ram.store(NUMBER, 7u32).expect("in memory");
    assert_eq!([sum(&mut guest), sum(&mut guest)], [sum_with(6), sum_with(7)]);
    assert_eq!(sum(&mut guests.enter(|_| ())), sum_with(number(PATCHED)), "the others do not");
}

#[test]
fn code_that_a_device_writes_is_noticed() {
    let guests = Guests::new();
    for taken in [false, true] {
        let mut guest = guests.enter(|_| ());
        if taken {
            assert_eq!(sum(&mut guest), sum_with(number(PATCHED)));
        }
        guest.ram.memory().write_obj(8u32, GuestAddress(guests.at)).expect("in memory");
        assert_eq!([sum(&mut guest), sum(&mut guest)], [sum_with(8); 2]);
    }
}

#[test]
fn a_state_that_is_put_back_goes_on_with_the_code_that_memory_holds() {
    let guests = Guests::new();
    let mut guest = guests.enter(|_| ());
    assert_eq!(sum(&mut guest), sum_with(number(PATCHED)));
    guest.ram.store(guests.at, 9u32).expect("in memory");
    let state = guest.vcpu.save().expect("saved");
    guest.vcpu.restore(&state).expect("put back");
    assert_eq!(sum(&mut guest), sum_with(9));
}
