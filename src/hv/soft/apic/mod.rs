//! placeholder until branch apic lands
#[derive(Debug)]
pub(super) struct Lapic;
impl Lapic {
    pub(super) fn mmio_base(&self) -> Option<u64> {
        None
    }
    pub(super) fn mmio_read(&mut self, _o: u64) -> u32 {
        0
    }
    pub(super) fn mmio_write(&mut self, _o: u64, _v: u32) {}
    pub(super) fn read_msr(&mut self, _m: u32) -> Option<u64> {
        None
    }
    pub(super) fn write_msr(&mut self, _m: u32, _v: u64) -> Option<()> {
        None
    }
    pub(super) fn tpr(&self) -> u64 {
        0
    }
    pub(super) fn set_tpr(&mut self, _v: u64) {}
}
#[derive(Debug)]
pub(super) struct IoApic;
impl IoApic {
    pub(super) fn mmio_read(&self, _o: u64) -> u32 {
        0
    }
    pub(super) fn mmio_write(&self, _o: u64, _v: u32) {}
}
