//! Port input and output, and who may do it (Intel SDM volume 1, section 19.5).

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::hv::soft::cpu::{Cpu, slot};
use crate::hv::soft::fault::{Exception, Flow, Stop};

/// Where the TSS says at which offset its I/O permission bitmap begins.
const BITMAP_BASE: u64 = 0x66;

impl Cpu {
    /// #GP(0) unless `bytes` ports from `port` on are free to the current level.
    pub(super) fn require_ports(&mut self, port: u16, bytes: u64) -> Result<(), Stop> {
        if self.cpl() <= self.iopl() {
            return Ok(());
        }
        let refused = Exception::general_protection(0).into();
        let limit = u64::from(self.tr.limit);
        if self.tr.unusable || BITMAP_BASE + 1 > limit {
            return Err(refused);
        }
        let base = u64::from(self.read_system::<u16>(self.tr.base.wrapping_add(BITMAP_BASE))?);
        let at = base + u64::from(port / 8);
        // Two bytes are read even where one would do.
        if at + 1 > limit {
            return Err(refused);
        }
        let bitmap = self.read_system::<u16>(self.tr.base.wrapping_add(at))?;
        if bitmap >> (port % 8) & ((1 << bytes) - 1) == 0 { Ok(()) } else { Err(refused) }
    }

    pub(super) fn port_in(&mut self, port: u16, bytes: u64) -> u64 {
        let mut data = [0; 8];
        self.io.pio_in(port, &mut data[..bytes as usize]);
        u64::from_le_bytes(data)
    }

    pub(super) fn port_out(&mut self, port: u16, bytes: u64, value: u64) {
        self.io.pio_out(port, &value.to_le_bytes()[..bytes as usize]);
    }

    fn port_operand(&self, insn: &Instruction, n: u32) -> u16 {
        if insn.op_kind(n) == OpKind::Register { self.regs[slot::RDX] as u16 } else { insn.immediate8().into() }
    }
}

pub(super) fn input(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    debug_assert_eq!(insn.mnemonic(), Mnemonic::In);
    let (port, bytes) = (cpu.port_operand(insn, 1), insn.op0_register().size() as u64);
    cpu.require_ports(port, bytes)?;
    let value = cpu.port_in(port, bytes);
    cpu.set_register(insn.op0_register(), value);
    Ok(Flow::Next)
}

pub(super) fn output(cpu: &mut Cpu, insn: &Instruction) -> Result<Flow, Stop> {
    let (port, bytes) = (cpu.port_operand(insn, 0), insn.op1_register().size() as u64);
    cpu.require_ports(port, bytes)?;
    cpu.port_out(port, bytes, cpu.register(insn.op1_register()));
    Ok(Flow::Next)
}
