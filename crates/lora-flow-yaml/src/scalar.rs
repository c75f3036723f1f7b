//! Scalars without quotes by the core schema of YAML 1.2, except that a number with a leading zero
//! is a string and that numbers must be finite and fit in 64 bits.

use serde_json::Number;

use crate::yaml::NodeValue;

/// The value of a scalar without quotes; an error is a message and a hint.
pub(crate) fn resolve_plain(text: &str) -> Result<NodeValue, (String, String)> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(NodeValue::Null),
        "true" | "True" | "TRUE" => return Ok(NodeValue::Bool(true)),
        "false" | "False" | "FALSE" => return Ok(NodeValue::Bool(false)),
        _ => {}
    }
    let quote = || "put quotes around it if it is text".to_owned();
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return Err((format!("`{text}` is not a finite number"), quote()));
    }
    let radix = |digits: Option<&str>, radix: u32| {
        let digits = digits.filter(|d| !d.is_empty() && d.chars().all(|c| c.is_digit(radix)))?;
        Some(u64::from_str_radix(digits, radix))
    };
    let prefixed = radix(text.strip_prefix("0x"), 16).or_else(|| radix(text.strip_prefix("0o"), 8));
    let too_big = || (format!("the number `{text}` does not fit in 64 bits"), quote());
    if let Some(number) = prefixed {
        return number.map(|n| NodeValue::Number(n.into())).map_err(|_| too_big());
    }
    if !looks_like_number(unsigned) {
        return Ok(NodeValue::String(text.to_owned()));
    }
    if unsigned.bytes().all(|b| b.is_ascii_digit()) {
        let plain = text.strip_prefix('+').unwrap_or(text);
        let number = plain.parse::<i64>().map(Number::from);
        let number = number.or_else(|_| plain.parse::<u64>().map(Number::from));
        return number.map(NodeValue::Number).map_err(|_| too_big());
    }
    let number = text.parse::<f64>().ok().and_then(Number::from_f64);
    number
        .map(NodeValue::Number)
        .ok_or_else(|| (format!("`{text}` is not a finite number"), quote()))
}

/// `12`, `1.5`, `.5`, `2.0e-4`; not `007`, not `1_000`.
fn looks_like_number(unsigned: &str) -> bool {
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((m, e)) => (m, Some(e.strip_prefix(['-', '+']).unwrap_or(e))),
        None => (unsigned, None),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    digits(whole)
        && digits(fraction)
        && !(whole.is_empty() && fraction.is_empty())
        && !(whole.len() > 1 && whole.starts_with('0'))
        && exponent.is_none_or(|e| !e.is_empty() && digits(e))
}
