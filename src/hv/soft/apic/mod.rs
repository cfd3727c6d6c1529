//! The interrupt controllers: a local APIC a vCPU, one IOAPIC, and the bus of messages between them.
//!
//! ```text
//!   device thread --IrqLine--> IoApic --Bus::send--> Mailbox --Lapic::poll--> IRR --> vCPU
//!                                ^                                             |
//!                                +-------------- EOI of level interrupts ------+
//! ```
//!
//! The bus is SDM 3A, 11.6.2 "Determining IPI Destination" over mailboxes; it belongs to no thread.
//! A [`Lapic`] belongs to its vCPU's thread. Lock order: the IOAPIC's mutex, then a mailbox's.

mod lapic;
mod timer;

use std::sync::Arc;

pub(crate) use lapic::Lapic;

use super::mailbox::Mailbox;
use crate::hv::ioapic::{self, Redirection};
use crate::hv::state::x86_64::Lapic as LapicState;

/// The IOAPIC that sends to the local APICs here.
pub(crate) type IoApic = ioapic::IoApic<Bus>;

/// Base address of a local APIC's page after reset.
pub(crate) const LAPIC_BASE: u64 = 0xfee0_0000;

/// What a message asks of its receiver (the delivery mode of an ICR or a redirection entry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    Fixed,
    LowestPriority,
    Nmi,
    Init,
    StartUp,
}

impl Delivery {
    /// Decodes the three mode bits. SMI and ExtINT are `None`, like the reserved encodings: this
    /// machine has neither a system management mode nor an 8259A.
    fn from_bits(bits: u32) -> Option<Self> {
        match bits & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::LowestPriority),
            4 => Some(Self::Nmi),
            5 => Some(Self::Init),
            6 => Some(Self::StartUp),
            _ => None,
        }
    }
}

/// A message on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    delivery: Delivery,
    vector: u8,
    level: bool,
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Destination {
    /// The local APIC with this id.
    Physical(u32),
    /// Those that match the logical address.
    Logical(u32),
    /// All of them.
    All,
    /// All but the one with this id.
    AllBut(u32),
}

impl Destination {
    /// The eight bits of an xAPIC or IOAPIC destination field.
    fn narrow(field: u8, logical: bool) -> Self {
        match (field, logical) {
            (0xff, _) => Self::All,
            (id, false) => Self::Physical(id.into()),
            (address, true) => Self::Logical(address.into()),
        }
    }

    /// The 32 bits of an x2APIC destination field.
    fn wide(field: u32, logical: bool) -> Self {
        match (field, logical) {
            (u32::MAX, _) => Self::All,
            (id, false) => Self::Physical(id),
            (address, true) => Self::Logical(address),
        }
    }

    fn includes(self, id: u32, address: LogicalAddress) -> bool {
        match self {
            Self::Physical(wanted) => wanted == id,
            Self::Logical(wanted) => address.matches(wanted),
            Self::All => true,
            Self::AllBut(one) => one != id,
        }
    }
}

/// How a local APIC decides whether a logical destination means it (SDM 11.6.2.2, 11.12.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LogicalAddress {
    /// Disabled, or not there yet.
    None,
    /// xAPIC flat model: one bit of eight.
    Flat(u8),
    /// xAPIC cluster model: cluster in the high four bits, members in the low four.
    Cluster(u8),
    /// x2APIC: cluster in the high 16 bits, members in the low 16.
    X2Apic(u32),
}

impl LogicalAddress {
    fn matches(self, wanted: u32) -> bool {
        match self {
            Self::None => false,
            Self::Flat(own) => u32::from(own) & wanted & 0xff != 0,
            Self::Cluster(own) => {
                let own = u32::from(own);
                own >> 4 == (wanted >> 4) & 0xf && own & wanted & 0xf != 0
            }
            Self::X2Apic(own) => own >> 16 == wanted >> 16 && own & wanted & 0xffff != 0,
        }
    }

    /// For [`Mailbox::set_address`], where senders on other threads find it; `None` is zero.
    fn to_bits(self) -> u64 {
        let (kind, value) = match self {
            Self::None => (0, 0),
            Self::Flat(own) => (1, own.into()),
            Self::Cluster(own) => (2, own.into()),
            Self::X2Apic(own) => (3, own),
        };
        kind << 32 | u64::from(value)
    }

    fn from_bits(bits: u64) -> Self {
        match bits >> 32 {
            1 => Self::Flat(bits as u8),
            2 => Self::Cluster(bits as u8),
            3 => Self::X2Apic(bits as u32),
            _ => Self::None,
        }
    }
}

/// The mailboxes of all vCPUs, by APIC id. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Bus {
    mailboxes: Arc<[Arc<Mailbox>]>,
}

impl Bus {
    /// A bus to `vcpus` empty mailboxes.
    pub(crate) fn new(vcpus: u8) -> Self {
        Self { mailboxes: (0..vcpus).map(|_| Arc::new(Mailbox::new())).collect() }
    }

    /// How many vCPUs there are.
    pub(crate) fn len(&self) -> usize {
        self.mailboxes.len()
    }

    /// The mailbox of the vCPU with APIC id `id`.
    pub(crate) fn mailbox(&self, id: u32) -> Option<&Arc<Mailbox>> {
        self.mailboxes.get(id as usize)
    }

    /// Puts a message into the mailbox of every receiver that `to` includes. Lowest priority is the
    /// lowest id of them: vCPUs here do not differ in what an interrupt costs them.
    fn send(&self, to: Destination, message: Message) {
        for (id, mailbox) in (0..).zip(self.mailboxes.iter()) {
            if !to.includes(id, LogicalAddress::from_bits(mailbox.address())) {
                continue;
            }
            match message.delivery {
                Delivery::Fixed => mailbox.post(message.vector, message.level),
                Delivery::LowestPriority => return mailbox.post(message.vector, message.level),
                Delivery::Nmi => mailbox.post_nmi(),
                Delivery::Init => mailbox.post_init(),
                Delivery::StartUp => mailbox.post_sipi(message.vector),
            }
        }
    }
}

impl ioapic::Bus for Bus {
    fn deliver(&self, entry: Redirection) {
        let Some(delivery) = Delivery::from_bits(entry.delivery()) else { return };
        if delivery == Delivery::StartUp {
            // Reserved here, unlike in an ICR.
            return;
        }
        let level = entry.is_level() && matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
        let to = Destination::narrow(entry.destination(), entry.is_logical());
        self.send(to, Message { delivery, vector: entry.vector(), level });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hv::soft::mailbox::Mail;

    fn posted(bus: &Bus) -> Vec<u32> {
        (0..).take_while(|id| bus.mailbox(*id).is_some()).filter(|id| bus.mailbox(*id).unwrap().any()).collect()
    }

    fn send(bus: &Bus, to: Destination, delivery: Delivery) -> Vec<u32> {
        bus.send(to, Message { delivery, vector: 0x40, level: false });
        let ids = posted(bus);
        for id in &ids {
            bus.mailbox(*id).unwrap().collect();
        }
        ids
    }

    fn addressed(addresses: &[LogicalAddress]) -> Bus {
        let bus = Bus::new(addresses.len() as u8);
        for (mailbox, address) in bus.mailboxes.iter().zip(addresses) {
            mailbox.set_address(address.to_bits());
        }
        bus
    }

    #[test]
    fn sdm_11_6_2_1_physical_destinations_and_shorthands() {
        let bus = Bus::new(3);
        assert_eq!(send(&bus, Destination::narrow(1, false), Delivery::Fixed), [1]);
        assert_eq!(send(&bus, Destination::narrow(7, false), Delivery::Fixed), [0u32; 0]);
        assert_eq!(send(&bus, Destination::narrow(0xff, false), Delivery::Fixed), [0, 1, 2]);
        assert_eq!(send(&bus, Destination::wide(0xff, false), Delivery::Fixed), [0u32; 0]);
        assert_eq!(send(&bus, Destination::wide(u32::MAX, false), Delivery::Nmi), [0, 1, 2]);
        assert_eq!(send(&bus, Destination::AllBut(1), Delivery::Init), [0, 2]);
    }

    #[test]
    fn sdm_11_6_2_2_flat_and_cluster_logical_destinations() {
        let bus = addressed(&[LogicalAddress::Flat(1), LogicalAddress::Flat(2), LogicalAddress::None]);
        assert_eq!(send(&bus, Destination::narrow(0b110, true), Delivery::Fixed), [1]);
        assert_eq!(send(&bus, Destination::narrow(0b011, true), Delivery::Fixed), [0, 1]);
        assert_eq!(send(&bus, Destination::narrow(0b011, true), Delivery::LowestPriority), [0]);
        let bus = addressed(&[LogicalAddress::Cluster(0x11), LogicalAddress::Cluster(0x21)]);
        assert_eq!(send(&bus, Destination::narrow(0x21, true), Delivery::Fixed), [1]);
        assert_eq!(send(&bus, Destination::narrow(0x22, true), Delivery::Fixed), [0u32; 0]);
    }

    #[test]
    fn sdm_11_12_10_x2apic_logical_destinations() {
        let bus = addressed(&[LogicalAddress::X2Apic(0x0000_0001), LogicalAddress::X2Apic(0x0001_0001)]);
        assert_eq!(send(&bus, Destination::wide(0x0001_ffff, true), Delivery::Fixed), [1]);
        assert_eq!(send(&bus, Destination::narrow(0x01, true), Delivery::Fixed), [0]);
    }

    #[test]
    fn logical_addresses_survive_the_mailbox() {
        for address in [
            LogicalAddress::None,
            LogicalAddress::Flat(0x80),
            LogicalAddress::Cluster(0xff),
            LogicalAddress::X2Apic(0xffff_8000),
        ] {
            assert_eq!(LogicalAddress::from_bits(address.to_bits()), address);
        }
    }

    #[test]
    fn datasheet_3_2_4_delivery_and_destination_modes_of_a_line() {
        let addresses = [0, 1, 2].map(|id| LogicalAddress::X2Apic(1 << id));
        let bus = addressed(&addresses);
        let pulse = |entry: u64| {
            ioapic::Bus::deliver(&bus, Redirection(entry));
            [0, 1, 2].map(|id| bus.mailbox(id).unwrap().collect())
        };
        let vectors = |entry| pulse(entry).map(|mail| mail.vectors[2] >> 16 & 1);
        assert_eq!(vectors(0x0600_0000_0000_0850), [0, 1, 1]);
        assert_eq!(vectors(0x0600_0000_0000_0950), [0, 1, 0]);
        assert_eq!(vectors(0xff00_0000_0000_0050), [1, 1, 1]);
        assert!(pulse(0x0200_0000_0000_0400)[2].signals.nmi);
        for reserved in [0x200, 0x300, 0x600, 0x700] {
            assert_eq!(pulse(0x0200_0000_0000_0050 | reserved), [Mail::default(), Mail::default(), Mail::default()]);
        }
    }
}
