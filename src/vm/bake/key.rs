//! What a baked snapshot depends on, and so where it is kept: all that shapes the guest before its first command.
//!
//! Not in it is what a restored guest is told before that: its name, its machine id, the time.

use kiln_wire::boot::GuestConfig;
use serde::Serialize;

use crate::image::Digest;
use crate::snapshot::FORMAT;
use crate::snapshot::Origin;
use crate::vm::VmConfig;
use crate::vmm::MACHINE_STATE_VERSION;

/// What the image is baked for: two programs that want the same have the same variant, whatever kiln they use.
#[derive(Debug, Serialize)]
struct Variant<'a> {
    image: &'a Digest,
    root: &'a str,
    guest: &'a GuestConfig,
    memory: u64,
    vcpus: u8,
    verbose_boot: bool,
    extra_cmdline: &'a str,
    warmup: Option<&'a str>,
}

/// And what with.
#[derive(Debug, Serialize)]
struct Material<'a> {
    variant: &'a Digest,
    origin: &'a Origin,
    cpu_profile: &'a str,
    snapshot_format: u64,
    machine_state: u32,
    kiln: &'a str,
}

/// Names what is baked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BakeKey {
    pub(super) variant: Digest,
    pub(super) key: Digest,
}

impl BakeKey {
    pub(super) fn new(
        image: &Digest,
        config: &VmConfig,
        guest: &GuestConfig,
        origin: &Origin,
        cpu_profile: &str,
    ) -> Self {
        let variant = digest_of(&Variant {
            image,
            root: &origin.root,
            guest,
            memory: config.memory.0,
            vcpus: config.vcpus,
            verbose_boot: config.verbose_boot,
            extra_cmdline: &config.extra_cmdline,
            warmup: config.warmup.as_ref().map(|warmup| warmup.tag()),
        });
        let key = digest_of(&Material {
            variant: &variant,
            origin,
            cpu_profile,
            snapshot_format: FORMAT,
            machine_state: MACHINE_STATE_VERSION,
            kiln: env!("CARGO_PKG_VERSION"),
        });
        Self { variant, key }
    }
}

fn digest_of(material: &impl Serialize) -> Digest {
    // Structures of strings and numbers always have a JSON form, and always the same.
    Digest::of(&serde_json::to_vec(material).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::units::Bytes;

    #[test]
    fn everything_that_shapes_a_guest_changes_the_key() {
        let (image, guest, config) = (Digest::of(b"image"), GuestConfig::default(), VmConfig::new);
        let name = str::to_owned;
        let origin = Origin { root: name("r"), kernel: name("k"), agent: name("a") };
        let key = |config: VmConfig| BakeKey::new(&image, &config, &guest, &origin, "cpu").key;
        let with_origin = |origin: &Origin| BakeKey::new(&image, &config(), &guest, origin, "cpu").key;
        let other_guest = GuestConfig { workdir: name("/srv"), ..GuestConfig::default() };
        let keys = [
            key(config()),
            key(config().memory(Bytes::mib(128))),
            key(config().vcpus(2)),
            key(config().verbose_boot(true)),
            key(config().extra_cmdline("debug")),
            key(config().warmup("one", |_| async { Ok(()) })),
            key(config().warmup("two", |_| async { Ok(()) })),
            with_origin(&Origin { root: name("R"), ..origin.clone() }),
            with_origin(&Origin { kernel: name("K"), ..origin.clone() }),
            with_origin(&Origin { agent: name("A"), ..origin.clone() }),
            BakeKey::new(&Digest::of(b"other"), &config(), &guest, &origin, "cpu").key,
            BakeKey::new(&image, &config(), &other_guest, &origin, "cpu").key,
            BakeKey::new(&image, &config(), &guest, &origin, "other").key,
        ];
        assert_eq!(keys.iter().collect::<HashSet<_>>().len(), keys.len());
        // What a restored guest is told is not in it.
        assert_eq!(key(config().hostname("other")), key(config()));
    }
}
