//! What comes from outside must not look like a line of the log, or do anything to a terminal. Every line is escaped here
//! as a whole, right before it is written, so that no message can forget it.

use std::fmt::Write as _;

/// What a line is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Text; with color, it has the escape sequences of its formatter.
    Text {
        /// Whether sequences that set colors and fonts are the formatter's, and stay.
        is_colored: bool,
    },
    /// An object of JSON.
    Json,
}

/// Characters that end a line, control a terminal, change the direction of text, or are not to be seen.
fn is_unsafe(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{feff}'
            | '\u{ffa0}' | '\u{fff9}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
}

/// Appends a line, without its end, with unsafe characters escaped.
pub(super) fn escape(line: &str, format: Format, to: &mut String) {
    let mut rest = line;
    while let Some(at) = rest.find(is_unsafe) {
        let (safe, tail) = rest.split_at(at);
        to.push_str(safe);
        let mut characters = tail.chars();
        let Some(character) = characters.next() else { break };
        rest = characters.as_str();
        match format {
            Format::Text { is_colored: true } if style_sequence(tail).is_some() => {
                let (sequence, after) = tail.split_at(style_sequence(tail).unwrap_or(0));
                to.push_str(sequence);
                rest = after;
            }
            Format::Text { .. } => to.extend(character.escape_default()),
            // An unsafe character of JSON is in a string.
            Format::Json => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing to a String does not fail.
                    let _ = write!(to, "\\u{unit:04x}");
                }
            }
        }
    }
    to.push_str(rest);
}

/// The length of the sequence that begins the text, if it only sets colors and fonts: `ESC [ numbers m`.
fn style_sequence(text: &str) -> Option<usize> {
    let numbers = text.strip_prefix("\x1b[")?;
    let end = numbers.find(|character: char| !character.is_ascii_digit() && character != ';')?;
    numbers[end..].starts_with('m').then_some(end + 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(line: &str, format: Format) -> String {
        let mut to = String::new();
        escape(line, format, &mut to);
        to
    }

    #[test]
    fn whatever_ends_a_line_or_hides_text_is_escaped() {
        let cases = [
            ("plain, Größe, 日本語, \u{1f600}", "plain, Größe, 日本語, \u{1f600}"),
            ("a\nb\r\nc", r"a\nb\r\nc"),
            ("a\0b\tc\u{b}\u{c}\u{85}", r"a\u{0}b\tc\u{b}\u{c}\u{85}"),
            ("\u{2028}\u{2029}", r"\u{2028}\u{2029}"),
            ("\u{202e}live\u{202c} \u{2066}x\u{2069} \u{200f}", r"\u{202e}live\u{202c} \u{2066}x\u{2069} \u{200f}"),
            ("zero\u{200b}width\u{feff}\u{ad}\u{2060}", r"zero\u{200b}width\u{feff}\u{ad}\u{2060}"),
            ("tag\u{e0041}", r"tag\u{e0041}"),
            ("\u{1b}[2J\u{1b}]0;title\u{7}\u{9b}2J\u{7f}", r"\u{1b}[2J\u{1b}]0;title\u{7}\u{9b}2J\u{7f}"),
            ("\u{1b}[31mred", r"\u{1b}[31mred"),
            ("", ""),
        ];
        for (line, expected) in cases {
            assert_eq!(escaped(line, Format::Text { is_colored: false }), expected);
        }
    }

    #[test]
    fn only_sequences_for_colors_and_fonts_stay_in_colored_text() {
        let colored = Format::Text { is_colored: true };
        assert_eq!(escaped("\u{1b}[2;31mx\u{1b}[0m\u{1b}[my", colored), "\u{1b}[2;31mx\u{1b}[0m\u{1b}[my");
        for line in ["\u{1b}[2J", "\u{1b}[31", "\u{1b}", "\u{1b}[?25l", "\u{1b}[3\u{1b}"] {
            assert_eq!(escaped(line, colored), escaped(line, Format::Text { is_colored: false }), "{line:?}");
        }
        assert_eq!(escaped("a\nb", colored), r"a\nb");
    }

    #[test]
    fn escaped_json_means_the_same() {
        for text in ["\u{202e}\u{85}\u{7f}\u{2028}", "\u{e0041}\u{1d173}", "\n\r\0\u{1b}", "日本\"\\"] {
            let line = serde_json::json!({"message": text}).to_string();
            let escaped = escaped(&line, Format::Json);
            assert!(!escaped.contains(is_unsafe), "{escaped:?}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped).unwrap()["message"], text);
        }
    }
}
