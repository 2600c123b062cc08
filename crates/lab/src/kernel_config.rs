//! The guest's kernel configuration, which is one for all releases: what only some of them have is marked.

use std::collections::HashSet;

use crate::version::Version;

/// The configuration, with its marks.
pub(crate) const TEXT: &str = include_str!("../guest/kernel.config");

/// The settings that a release has, without comments: those marked `# since VERSION` from that on, and those marked
/// `# until VERSION` up to and including that.
pub(crate) fn settings(text: &str, version: Version) -> String {
    let mut settings = String::new();
    for line in text.lines().map(str::trim) {
        let (setting, mark) =
            if line.starts_with("# CONFIG_") { (line, "") } else { line.split_once('#').unwrap_or((line, "")) };
        let setting = setting.trim_end();
        let applies = match mark.trim().split_once(' ') {
            Some(("since", first)) => first.parse().is_ok_and(|first| version >= first),
            Some(("until", last)) => last.parse().is_ok_and(|last| version <= last),
            _ => true,
        };
        if applies && !setting.is_empty() {
            settings += setting;
            settings.push('\n');
        }
    }
    settings
}

/// The settings of `wanted` that `actual` does not have.
pub(crate) fn missing(wanted: &str, actual: &str) -> Vec<String> {
    let actual: HashSet<&str> = actual.lines().collect();
    let settings = wanted.lines().filter(|line| line.starts_with("CONFIG_"));
    settings.filter(|setting| !actual.contains(setting)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_those_the_release_has() {
        let text = "# text\nCONFIG_IP_VS=y\nCONFIG_NEW=y   # since 6.10\nCONFIG_OLD=y # until 6.1\n# CONFIG_BLOCK is not set\n";
        let common = "CONFIG_IP_VS=y\n";
        let off = "# CONFIG_BLOCK is not set\n";
        assert_eq!(settings(text, Version::new(6, 1)), format!("{common}CONFIG_OLD=y\n{off}"));
        assert_eq!(settings(text, Version::new(6, 2)), format!("{common}{off}"));
        assert_eq!(settings(text, Version::new(6, 12)), format!("{common}CONFIG_NEW=y\n{off}"));
    }

    #[test]
    fn every_mark_in_the_configuration_is_understood() {
        let marks = TEXT.lines().filter(|line| line.starts_with("CONFIG_")).filter_map(|line| line.split_once('#'));
        for (setting, mark) in marks {
            let (word, version) = mark.trim().split_once(' ').unwrap_or_default();
            assert!(["since", "until"].contains(&word) && version.parse::<Version>().is_ok(), "{setting}: {mark}");
        }
    }

    #[test]
    fn every_setting_must_be_in_the_final_configuration() {
        let wanted = "CONFIG_IP_VS=y\nCONFIG_IPV6=y\n# CONFIG_BLOCK is not set\nCONFIG_IP_VS_TAB_BITS=12\n";
        assert!(missing(wanted, "CONFIG_IP_VS_TAB_BITS=12\nCONFIG_IPV6=y\nCONFIG_IP_VS=y\n").is_empty());
        assert_eq!(
            missing(wanted, "CONFIG_IP_VS=m\n# CONFIG_IPV6 is not set\nCONFIG_IP_VS_TAB_BITS=12\n"),
            ["CONFIG_IP_VS=y", "CONFIG_IPV6=y"]
        );
        assert!(!missing(&settings(TEXT, Version::new(6, 1)), "").is_empty());
    }
}
