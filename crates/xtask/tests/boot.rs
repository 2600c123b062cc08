//! The lab as its users see it: exit codes, output, files, and what happens when the guest or a command misbehaves.
//!
//! `cargo xtask test` runs these on this machine, because they boot guests.

use std::fs;
use std::time::{Duration, Instant};

use lab::{Error, Job, Output, Scratch};

fn job(program: &str) -> Job {
    Job::new(program).init(env!("CARGO_BIN_EXE_xtask"))
}

fn shell(script: &str) -> Job {
    job("sh").arg("-c").arg(script)
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn exit_codes_come_back_as_a_shell_gives_them() {
    assert_eq!(lab::output(&job("true")).unwrap().status.code(), 0);
    assert_eq!(lab::output(&shell("exit 7")).unwrap().status.code(), 7);
    assert_eq!(lab::output(&shell("kill -SEGV $$")).unwrap().status.code(), 139);
    let output = lab::output(&job("/no/such/program")).unwrap();
    assert_eq!(output.status.code(), 127);
    assert!(text(&output).1.contains("/no/such/program"), "{output:?}");
    assert_eq!(lab::output(&job("/etc/passwd")).unwrap().status.code(), 126);
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn output_and_error_output_are_kept_apart_and_unchanged() {
    let dir = Scratch::new().unwrap();
    // A line feed at the end, so that `tac` changes the order of the lines and nothing else.
    let bytes = [noise(1 << 20), vec![b'\n']].concat();
    fs::write(dir.path().join("noise"), &bytes).unwrap();
    let output = lab::output(&shell("cat noise & tac noise >&2; wait").current_dir(dir.path())).unwrap();
    assert!(output.status.success());
    let sorted = |bytes: &[u8]| {
        let mut lines: Vec<Vec<u8>> = bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        lines.sort();
        lines
    };
    assert!(output.stdout == bytes, "{} of {} bytes arrived, or they differ", output.stdout.len(), bytes.len());
    assert!(
        output.stderr != bytes && sorted(&output.stderr) == sorted(&bytes),
        "the error output is not the same lines"
    );

    let output = lab::output(&shell("echo out; echo err >&2")).unwrap();
    assert_eq!(text(&output), ("out\n".into(), "err\n".into()));
}

/// Bytes of every value in no order, from a linear congruential generator.
fn noise(length: usize) -> Vec<u8> {
    let step = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Some((*state >> 56) as u8)
    };
    let mut state = 1;
    std::iter::from_fn(|| step(&mut state)).take(length).collect()
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn the_command_has_the_environment_arguments_and_directory_it_was_given() {
    let script = r#"printf '%s|%s|%s|' "$STRANGE" "$1" "$PWD"; id -u"#;
    let job = shell(script).arg("sh").arg("a  b\n'\"$c").env("STRANGE", "1\n2=\u{e9}").current_dir("/usr/share");
    let output = lab::output(&job).unwrap();
    assert_eq!(text(&output).0, "1\n2=\u{e9}|a  b\n'\"$c|/usr/share|0\n");
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn only_what_is_written_to_a_writable_directory_stays() {
    let kept = Scratch::new().unwrap();
    let lost = Scratch::new().unwrap();
    let script = "echo kept >$1/file && echo lost >$2/file && cat $2/file";
    let job = shell(script).arg("sh").arg(kept.path()).arg(lost.path()).writable(kept.path());
    let output = lab::output(&job).unwrap();
    assert_eq!(text(&output), ("lost\n".into(), String::new()));
    assert_eq!(fs::read_to_string(kept.path().join("file")).unwrap(), "kept\n");
    assert!(!lost.path().join("file").exists());
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn a_kernel_panic_is_an_error_with_the_end_of_the_console() {
    let error = lab::output(&shell("echo c >/proc/sysrq-trigger; sleep 60")).unwrap_err();
    let Error::GuestDied { console, .. } = error else { panic!("{error:?}") };
    assert!(console.contains("Kernel panic"), "{console}");
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn a_guest_that_powers_off_early_is_an_error() {
    let error = lab::output(&shell("echo o >/proc/sysrq-trigger; sleep 60")).unwrap_err();
    assert!(matches!(error, Error::GuestDied { .. }), "{error:?}");
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn a_directory_the_guest_does_not_have_is_an_error() {
    let error = lab::output(&job("true").current_dir("/dev/no-such-directory")).unwrap_err();
    assert!(matches!(&error, Error::GuestSetup(message) if message.contains("no-such-directory")), "{error:?}");
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn a_command_that_takes_too_long_is_stopped() {
    let started = Instant::now();
    let error = lab::output(&job("sleep").arg("600").time_limit(Duration::from_secs(2))).unwrap_err();
    assert!(matches!(error, Error::TimeLimit { .. }), "{error:?}");
    // Far less than the command takes, far more than it takes to stop it.
    assert!(started.elapsed() < Duration::from_secs(300), "{:?}", started.elapsed());
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn several_guests_run_at_the_same_time() {
    std::thread::scope(|scope| {
        let guests = [1, 2, 3, 4].map(|number| scope.spawn(move || lab::output(&shell(&format!("exit {number}")))));
        let codes = guests.map(|guest| guest.join().unwrap().unwrap().status.code());
        assert_eq!(codes, [1, 2, 3, 4]);
    });
}

#[test]
#[ignore = "boots the lab: cargo xtask test"]
fn the_first_process_of_the_guest_can_run_itself() {
    let job = Job::this_executable().init(env!("CARGO_BIN_EXE_xtask")).arg("lab").arg("--help");
    let output = lab::output(&job).unwrap();
    assert!(output.status.success() && text(&output).0.contains("--time-limit"), "{output:?}");
}
