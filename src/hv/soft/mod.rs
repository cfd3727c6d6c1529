//! The software x86-64 processor.
#![forbid(unsafe_code)]
