//! The agent takes the arguments and the configuration of every container, without a warning.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::kustomize::{build, documents, find, merge};
use crate::{deploy, kubeadm};

/// What the agent says to a container's arguments, with the files of a `ConfigMap` where they name them.
fn says(arguments: &[&str], files: &Value) -> String {
    let dir = TempDir::new().unwrap();
    for (name, content) in files.as_object().unwrap() {
        fs::write(dir.path().join(name), content.as_str().unwrap()).unwrap();
    }
    let written = dir.path().join("written");
    let mut command = Command::new(env!("CARGO_BIN_EXE_kube-ipvs"));
    // First: a subcommand ends the flags.
    command.arg("--write-config-to").arg(&written);
    for argument in arguments {
        command.arg(match argument.strip_prefix("--config=") {
            Some(path) => {
                let name = Path::new(path).file_name().unwrap().to_string_lossy();
                format!("--config={}", dir.path().join(&*name).display())
            }
            None => argument.replace("$(NODE_NAME)", "node-a"),
        });
    }
    let output = command.env("NO_COLOR", "1").output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && written.is_file(), "{arguments:?}: {log}");
    log
}

/// The arguments of each container of a `DaemonSet`.
fn arguments(daemon_set: &Value) -> Vec<Vec<&str>> {
    let pod = &daemon_set["spec"]["template"]["spec"];
    let containers = ["initContainers", "containers"].into_iter().flat_map(|list| pod[list].as_array().unwrap());
    containers
        .map(|container| {
            // What follows the name of the program.
            let command = container["command"].as_array().into_iter().flatten().skip(1);
            command
                .chain(container["args"].as_array().into_iter().flatten())
                .map(|word| word.as_str().unwrap())
                .collect()
        })
        .collect()
}

#[test]
fn arguments_and_configuration_are_accepted_without_a_warning() {
    let base = build(&deploy().join("base"), &[]);
    let own = &find(&base, "ConfigMap", "kube-ipvs")["data"];
    let overlay = build(&deploy().join("overlays/take-over-kubeadm"), &[]);
    let theirs = &documents(&kubeadm().join("config-map.yaml"))[0]["data"];
    let mut swapped = documents(&kubeadm().join("daemon-set.yaml")).remove(0);
    merge(&mut swapped, documents(&deploy().join("patches/kube-proxy-becomes-kube-ipvs.yaml")).remove(0), "");
    let cases = [
        (find(&base, "DaemonSet", "kube-ipvs"), own, 2),
        (find(&overlay, "DaemonSet", "kube-ipvs"), theirs, 3),
        (&swapped, theirs, 3),
    ];
    for (daemon_set, files, count) in cases {
        let all = arguments(daemon_set);
        assert_eq!(all.len(), count);
        for arguments in all {
            assert!(arguments.iter().any(|argument| argument.starts_with("--config=")), "{arguments:?}");
            let log = says(&arguments, files);
            assert!(!log.contains("WARN") && !log.contains("ERROR") && !log.contains("without effect"), "{log}");
        }
    }
}

#[test]
fn commented_settings_of_the_configuration_are_valid() {
    let base = build(&deploy().join("base"), &[]);
    let mut files = find(&base, "ConfigMap", "kube-ipvs")["data"].clone();
    let text = files["config.conf"].as_str().unwrap();
    // What explains has one space.
    let shown = |line: &str| {
        line.trim_start().strip_prefix('#').is_some_and(|rest| !rest.starts_with(' ') || rest.starts_with("  "))
    };
    assert_eq!(text.lines().filter(|line| shown(line)).count(), 14);
    let lines = text.lines().map(|line| if shown(line) { line.replacen('#', "", 1) } else { line.to_owned() });
    files["config.conf"] = lines.collect::<Vec<_>>().join("\n").into();
    let log = says(&["--config=/x/config.conf"], &files);
    assert!(!log.contains("WARN"), "{log}");
    // And what nobody knows would be found.
    files["config.conf"] = files["config.conf"].as_str().unwrap().replace("strictARP", "strictArp").into();
    assert!(says(&["--config=/x/config.conf"], &files).contains("unknown field"));
}
