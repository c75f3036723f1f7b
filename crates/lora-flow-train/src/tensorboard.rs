//! TensorBoard event files: scalars as records of TensorFlow's log format.
//!
//! A record is its length (u64), a checksum of the length, the event, and a checksum of the event;
//! integers are little-endian, checksums are CRC-32C, rotated and shifted ("masked"). An event is
//! a Protocol Buffers message; the few fields needed here are written by hand: `Event { wall_time
//! = 1, step = 2, file_version = 3, summary = 5 }`, `Summary { value = 1 }`, `Value { tag = 1,
//! simple_value = 2 }`.

use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use lora_flow_core::{Result, ResultExt};

/// Folder of the event files beside the log.
pub const FOLDER: &str = "tensorboard";

/// An open event file.
#[derive(Debug)]
pub struct EventFile {
    file: std::fs::File,
}

impl EventFile {
    /// Starts a file in `dir`. Every start of a run has its own, named by the time; TensorBoard
    /// reads them one after the other.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn create(dir: &Path) -> Result<Self> {
        fs_err::create_dir_all(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!(
            "events.out.tfevents.{:010}.{:09}.lora-flow",
            now.as_secs(),
            now.subsec_nanos()
        );
        let path = dir.join(name);
        let file = std::fs::File::create(&path)
            .with_context(|| format!("cannot create `{}`", path.display()))?;
        let mut out = Self { file };
        let mut event = Vec::new();
        bytes(&mut event, 3, b"brain.Event:2");
        out.record(wall(now.as_secs_f64(), event))?;
        Ok(out)
    }

    /// Writes scalars of one step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut entry = Vec::new();
            bytes(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &entry);
        }
        let mut event = vec![2 << 3];
        varint(&mut event, step);
        bytes(&mut event, 5, &summary);
        self.record(wall(now.as_secs_f64(), event))
    }

    fn record(&mut self, event: Vec<u8>) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let mut out = Vec::with_capacity(event.len() + 16);
        out.extend(length);
        out.extend(masked(&length).to_le_bytes());
        out.extend(&event);
        out.extend(masked(&event).to_le_bytes());
        // One write, so that a reader of a live run sees whole records.
        self.file.write_all(&out).context("cannot write the event file")
    }
}

/// An event with its time.
fn wall(seconds: f64, rest: Vec<u8>) -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(seconds.to_le_bytes());
    event.extend(rest);
    event
}

/// A field of bytes, a text or a message.
fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), a bit at a time: event files are small.
fn crc32c(data: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    let byte = |crc: u32, b: &u8| (0..8).fold(crc ^ u32::from(*b), |crc, _| step(crc));
    !data.iter().fold(!0, byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_its_definition() {
        // Check values of RFC 3720, appendix B.4, and of the CRC catalogue.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    }

    #[test]
    fn records_hold_the_version_and_the_scalars() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(dir.path()).unwrap();
        file.scalars(300, &[("train/loss", 1.5), ("x", -2.0)]).unwrap();
        drop(file);
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut rest = &std::fs::read(path).unwrap()[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let at = |from: usize| u32::from_le_bytes(rest[from..from + 4].try_into().unwrap());
            assert_eq!(at(8), masked(&rest[..8]));
            assert_eq!(at(12 + length), masked(&rest[12..12 + length]));
            events.push(rest[12..12 + length].to_vec());
            rest = &rest[16 + length..];
        }
        assert_eq!(events.len(), 2);
        assert!(events[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        // Step 300 as a varint, then the summary with its two values.
        assert_eq!(events[1][9..12], [0x10, 0xac, 0x02]);
        let loss = [&b"\x0a\x0atrain/loss\x15"[..], &1.5f32.to_le_bytes()].concat();
        let x = [&b"\x0a\x01x\x15"[..], &(-2f32).to_le_bytes()].concat();
        let value = |v: &[u8]| [&[0x0a, v.len() as u8], v].concat();
        let summary = [value(&loss), value(&x)].concat();
        assert_eq!(events[1][12..], [&[0x2a, summary.len() as u8], &summary[..]].concat());
    }
}
