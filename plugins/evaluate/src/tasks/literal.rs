//! Python literals as templates print them: what `ast.literal_eval` reads of strings, numbers and
//! lists of them.

use serde_json::Value;

/// Reads a list or tuple of literals, or a single one. None if it is anything else.
pub(crate) fn literal(text: &str) -> Option<Value> {
    let mut reader = Reader { rest: text.trim() };
    let value = reader.value()?;
    reader.rest.trim().is_empty().then_some(value)
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn value(&mut self) -> Option<Value> {
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            '[' => self.list(']'),
            '(' => self.list(')'),
            quote @ ('\'' | '"') => self.string(quote).map(Value::from),
            _ => {
                let end = self.rest.find([',', ']', ')']).unwrap_or(self.rest.len());
                let (word, rest) = self.rest.split_at(end);
                self.rest = rest;
                match word.trim() {
                    "True" => Some(Value::from(true)),
                    "False" => Some(Value::from(false)),
                    "None" => Some(Value::Null),
                    word => word.parse::<i64>().map(Value::from).ok().or_else(|| {
                        word.parse::<f64>().ok().filter(|x| x.is_finite()).map(Value::from)
                    }),
                }
            }
        }
    }

    fn list(&mut self, close: char) -> Option<Value> {
        self.rest = &self.rest[1..];
        let mut items = Vec::new();
        loop {
            self.rest = self.rest.trim_start();
            if let Some(rest) = self.rest.strip_prefix(close) {
                self.rest = rest;
                return Some(Value::Array(items));
            }
            items.push(self.value()?);
            self.rest = self.rest.trim_start();
            match self.rest.strip_prefix(',') {
                Some(rest) => self.rest = rest,
                None if self.rest.starts_with(close) => {}
                None => return None,
            }
        }
    }

    fn string(&mut self, quote: char) -> Option<String> {
        let mut out = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((i, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.rest = &self.rest[i + c.len_utf8()..];
                    return Some(out);
                }
                '\\' => match chars.next()?.1 {
                    'n' => out.push('\n'),
                    't' => out.push('\t'),
                    'r' => out.push('\r'),
                    '\n' => {}
                    'x' => out.push(code(&mut chars, 2)?),
                    'u' => out.push(code(&mut chars, 4)?),
                    'U' => out.push(code(&mut chars, 8)?),
                    c @ ('\\' | '\'' | '"') => out.push(c),
                    c => out.extend(['\\', c]),
                },
                c => out.push(c),
            }
        }
        None
    }
}

fn code(chars: &mut impl Iterator<Item = (usize, char)>, digits: usize) -> Option<char> {
    let hex: String = chars.take(digits).map(|(_, c)| c).collect();
    char::from_u32(u32::from_str_radix(&hex, 16).ok().filter(|_| hex.len() == digits)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lists_of_strings_and_numbers_are_read_as_python_does() {
        assert_eq!(
            literal("['it\\'s', \"a\\n\", 'ü\\xe9\\u00e9']"),
            Some(json!(["it's", "a\n", "üéé"]))
        );
        assert_eq!(literal(" [1, -2.5, [True, None],] "), Some(json!([1, -2.5, [true, null]])));
        assert_eq!(literal("('a', 'b')"), Some(json!(["a", "b"])));
        assert_eq!(literal("[]"), Some(json!([])));
        for bad in ["[a]", "['a'", "['a' 'b']", "['a'] x", "", "'a"] {
            assert_eq!(literal(bad), None, "{bad}");
        }
    }
}
