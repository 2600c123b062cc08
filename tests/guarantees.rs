//! Every test that docs/guarantees.md names exists.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// All functions of all Rust files below a directory.
fn functions(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.ends_with("target") {
            functions(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(path).unwrap();
            let names = text.split("fn ").skip(1).filter_map(|rest| rest.split('(').next());
            found.extend(names.map(str::to_owned));
        }
    }
}

#[test]
fn every_test_that_holds_a_promise_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut known = BTreeSet::new();
    for directory in ["src", "tests", "crates"] {
        functions(&root.join(directory), &mut known);
    }
    let page = fs::read_to_string(root.join("docs/guarantees.md")).unwrap();
    let quoted: Vec<&str> = page.split('`').skip(1).step_by(2).collect();
    // A sentence in small letters is the name of a test.
    let is_test = |it: &&str| {
        it.matches('_').count() >= 3 && it.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let tests: Vec<&str> = quoted.iter().copied().filter(is_test).collect();
    assert!(tests.len() > 30, "{tests:?}");
    let missing: Vec<&str> = tests.into_iter().filter(|it| !known.contains(*it)).collect();
    assert_eq!(missing, [""; 0]);
    let files: Vec<&str> = quoted
        .into_iter()
        .filter(|it| it.contains('/') && Path::new(it).extension().is_some_and(|it| it == "rs"))
        .collect();
    let missing: Vec<&str> = files
        .into_iter()
        .filter(|file| ![root.join(file), root.join("crates").join(file)].iter().any(|it| it.exists()))
        .collect();
    assert_eq!(missing, [""; 0]);
}
