//! Signals by name, as STOPSIGNAL has them.

/// The names of Linux's signals, in the order of their numbers from 1 on.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];

/// Other names of the same.
const ALIASES: [(&str, u8); 4] = [("IOT", 6), ("CLD", 17), ("POLL", 29), ("UNUSED", 31)];

/// The first and the last real-time signal that programs use; the C library keeps the two before them.
const RTMIN: u8 = 34;
const RTMAX: u8 = 64;

/// The number of the signal that `text` means, as a Dockerfile's STOPSIGNAL says it: `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`, in
/// capitals or not. `None` when there is no such signal.
///
/// ```
/// use kiln::workload::signal_number;
///
/// assert_eq!(signal_number("SIGQUIT"), Some(3));
/// assert_eq!(signal_number("SIGRTMIN+3"), Some(37));
/// assert_eq!(signal_number("SIGNONE"), None);
/// ```
#[must_use]
pub fn signal_number(text: &str) -> Option<u8> {
    if text.starts_with(|first: char| first.is_ascii_digit()) {
        return text.parse().ok().filter(|number| (1..=RTMAX).contains(number));
    }
    let text = text.to_ascii_uppercase();
    let name = text.strip_prefix("SIG").unwrap_or(&text);
    if let Some(at) = NAMES.iter().position(|known| *known == name) {
        return u8::try_from(at + 1).ok();
    }
    if let Some((_, number)) = ALIASES.iter().find(|(alias, _)| *alias == name) {
        return Some(*number);
    }
    let real_time = match name {
        "RTMIN" => Some(RTMIN),
        "RTMAX" => Some(RTMAX),
        _ => {
            let above = name.strip_prefix("RTMIN+").and_then(offset).and_then(|offset| RTMIN.checked_add(offset));
            let below = name.strip_prefix("RTMAX-").and_then(offset).and_then(|offset| RTMAX.checked_sub(offset));
            above.or(below)
        }
    };
    real_time.filter(|number| (RTMIN..=RTMAX).contains(number))
}

/// Digits only: `+3` would parse too.
fn offset(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_form_of_a_signal_is_understood() {
        for text in ["SIGTERM", "TERM", "15", "sigterm", "Term"] {
            assert_eq!(signal_number(text), Some(15), "{text}");
        }
        let known = [
            ("SIGHUP", 1),
            ("ABRT", 6),
            ("SIGIOT", 6),
            ("KILL", 9),
            ("SIGSTKFLT", 16),
            ("WINCH", 28),
            ("POLL", 29),
            ("SIGSYS", 31),
            ("RTMIN", 34),
            ("SIGRTMIN+0", 34),
            ("SIGRTMIN+3", 37),
            ("rtmin+30", 64),
            ("SIGRTMAX-1", 63),
            ("RTMAX-30", 34),
            ("RTMAX", 64),
            ("1", 1),
            ("64", 64),
        ];
        for (text, number) in known {
            assert_eq!(signal_number(text), Some(number), "{text}");
        }
    }

    #[test]
    fn what_is_no_signal_is_none() {
        for text in [
            "",
            "SIG",
            "0",
            "65",
            "256",
            "-1",
            "+15",
            "15 ",
            " TERM",
            "SIGSIGTERM",
            "SIGRTMIN+31",
            "RTMIN-1",
            "RTMAX+1",
            "RTMAX-31",
            "RTMIN+",
            "RTMIN++1",
            "RTMIN+256",
            "SIGTERM\0",
            "TERMINATE",
        ] {
            assert_eq!(signal_number(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_understood_is_a_signal(text in "\\PC{0,12}|(SIG)?RT(MIN|MAX)[+-][0-9]{0,4}") {
            prop_assert!(signal_number(&text).is_none_or(|number| (1..=64).contains(&number)));
        }
    }
}
