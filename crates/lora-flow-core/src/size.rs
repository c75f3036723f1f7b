//! Sizes as people write them.

/// Bytes of `1234`, `10MB`, `2.5 GiB`: a number with `B`, `KB`, `MB`, `GB`, `KiB`, `MiB`, `GiB` or
/// without a unit.
pub fn parse_size(text: &str) -> Option<f64> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_decimal_or_binary() {
        assert_eq!(parse_size(" 10MB "), Some(1e7));
        assert_eq!(parse_size("1.5 KiB"), Some(1536.0));
        assert_eq!(parse_size("7"), Some(7.0));
        assert_eq!((parse_size("7 mb"), parse_size("MB"), parse_size("-1")), (None, None, None));
    }
}
