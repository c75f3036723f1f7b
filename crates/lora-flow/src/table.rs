//! Plain-text tables and the human forms of sizes and times.

use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};

/// A borderless table with a header line, as wide as the terminal where there is one.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header.to_vec());
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    let terminal = console::Term::stdout();
    match terminal.size_checked() {
        Some((_, width)) if terminal.is_term() => table.set_width(width),
        _ => table.set_content_arrangement(ContentArrangement::Disabled),
    };
    table
}

/// `860 ms`, `12.4 s`, `3 m 07 s`, `2 h 05 m`.
pub fn duration(d: Duration) -> String {
    let seconds = d.as_secs_f64();
    if seconds < 0.9995 {
        format!("{} ms", d.as_millis())
    } else if seconds < 59.95 {
        format!("{seconds:.1} s")
    } else if seconds < 3600.0 {
        format!("{} m {:02} s", d.as_secs() / 60, d.as_secs() % 60)
    } else {
        format!("{} h {:02} m", d.as_secs() / 3600, d.as_secs() / 60 % 60)
    }
}

/// `512 B`, `9.8 MB`, `1.2 GB` (powers of ten).
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well_at_every_scale() {
        let text = |ms| duration(Duration::from_millis(ms));
        assert_eq!(text(7), "7 ms");
        assert_eq!(text(1_000), "1.0 s");
        assert_eq!(text(59_970), "0 m 59 s");
        assert_eq!(text(187_000), "3 m 07 s");
        assert_eq!(text(7_500_000), "2 h 05 m");
    }

    #[test]
    fn sizes_use_powers_of_ten() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(98_362_432), "98.4 MB");
        assert_eq!(bytes(1_000_000_000), "1.0 GB");
    }
}
