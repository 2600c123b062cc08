//! What cargo knows: which executables have tests, and where the agent's is.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use lab::cross::CrossCompiler;
use serde::Deserialize;

/// The executable with the tests of one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TestExecutable {
    /// The target's name: that of the library, or that of the file in `tests/`.
    pub(crate) target: String,
    pub(crate) path: PathBuf,
    /// The directory of the package, where its tests run.
    pub(crate) package_dir: PathBuf,
}

/// One line of `cargo --message-format=json`, as far as it matters here.
#[derive(Deserialize)]
struct Message {
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// The cargo that started us, or the one in `PATH`, without what the first says of this package: build scripts, such as that
/// of `ring`, would take it for a change and everything that depends on them would be compiled anew each time.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let says = |name: &str| {
        name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") || name.starts_with("CARGO_BIN_")
    };
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(says)) {
        command.env_remove(name);
    }
    command
}

/// The features that tests and the agent that they run are built with.
pub(crate) const FEATURES: &str = "--features=fault-points";

/// What the tests are.
pub(crate) struct Built {
    pub(crate) executables: Vec<TestExecutable>,
    /// The agent that they run.
    pub(crate) agent: PathBuf,
}

/// Builds all tests of the workspace, and with them the agent.
pub(crate) fn build_tests() -> Result<Built> {
    let arguments = ["test", "--workspace", FEATURES, "--no-run", "--message-format=json-render-diagnostics"];
    let output = stdout(cargo().args(arguments))?;
    Ok(Built { executables: parse_test_executables(&output)?, agent: parse_binary(&output, "kube-ipvs")? })
}

/// Builds the agent and says where it is.
pub(crate) fn agent() -> Result<PathBuf> {
    // With the packages and features of the tests: others would build it, and all it depends on, once more.
    let arguments = ["build", "--workspace", "--bin=kube-ipvs", FEATURES, "--message-format=json-render-diagnostics"];
    parse_binary(&stdout(cargo().args(arguments))?, "kube-ipvs")
}

/// The workspace these chores are of.
const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Builds the agent as it is shipped, an executable that needs no other file, and says where it is.
pub(crate) fn static_agent(target: Option<&str>) -> Result<PathBuf> {
    build_static(cargo(), Path::new(WORKSPACE), target)
}

/// Builds the agent as it is shipped from the workspace in another directory.
pub(crate) fn static_agent_in(directory: &Path) -> Result<PathBuf> {
    let mut command = cargo();
    // Where whoever started us builds is not where that one does.
    command.current_dir(directory).env("CARGO_TARGET_DIR", directory.join("target"));
    build_static(command, directory, None)
}

fn build_static(mut command: Command, directory: &Path, target: Option<&str>) -> Result<PathBuf> {
    let host = host()?;
    let target = target.unwrap_or(&host);
    if target != host {
        compiler_for(target)?.configure(&mut command);
    }
    command.args(["build", "--locked", "--release", "--package=kube-ipvs", "--bin=kube-ipvs"]);
    command.args(["--message-format=json-render-diagnostics", &format!("--target={target}")]);
    let given = std::env::var("RUSTFLAGS").unwrap_or_default();
    let flags = format!("{given} -C target-feature=+crt-static{}", same_everywhere(directory)?);
    command.env("RUSTFLAGS", flags.trim_start());
    parse_binary(&stdout(&mut command)?, "kube-ipvs")
}

/// A compiler for another architecture.
fn compiler_for(target: &str) -> Result<CrossCompiler> {
    CrossCompiler::prepare(target, env!("CARGO_PKG_RUST_VERSION")).context("no compiler for the target")
}

/// Runs the tests of packages that need no kernel, for another architecture, as static executables under an emulator.
pub(crate) fn test_for(
    target: &str,
    packages: &[&str],
    tests: &[&str],
    skipped: &str,
    filter: Option<&str>,
) -> Result<()> {
    let (runner, emulator) = lab::cross::emulator(target)?;
    let mut command = cargo();
    compiler_for(target)?.configure(&mut command);
    command.args(["test", "--locked", "--lib", "--no-fail-fast", &format!("--target={target}")]);
    command.args(packages.iter().map(|package| format!("--package={package}")));
    command.args(tests.iter().map(|test| format!("--test={test}"))).args(["--", "--skip", skipped]).args(filter);
    let given = std::env::var("RUSTFLAGS").unwrap_or_default();
    let flags = format!("{given} -C target-feature=+crt-static");
    command.env("RUSTFLAGS", flags.trim_start()).env(runner, emulator).current_dir(WORKSPACE);
    if !command.status().context("cannot run cargo")?.success() {
        bail!("tests for {target} failed");
    }
    Ok(())
}

/// Flags that keep paths of this machine out of what is built, where panics tell of files: whoever builds the same elsewhere
/// gets the same.
fn same_everywhere(directory: &Path) -> Result<String> {
    let here = directory.canonicalize().context("cannot tell the current directory")?;
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home =
        home.or_else(|| Some(std::env::home_dir()?.join(".cargo"))).context("cannot tell where cargo's home is")?;
    Ok(format!(" --remap-path-prefix={}=/kube-ipvs --remap-path-prefix={}=/cargo", here.display(), home.display()))
}

/// Builds these chores as an executable that is not in the way of what it measures, and says where it is.
pub(crate) fn release_xtask() -> Result<PathBuf> {
    let arguments = ["build", "--locked", "--release", "--package=xtask"];
    let messages = "--message-format=json-render-diagnostics";
    parse_binary(&stdout(cargo().args(arguments).arg(messages))?, "xtask")
}

/// The target that cargo builds for when it is told none.
fn host() -> Result<String> {
    let version = stdout(cargo().args(["--version", "--verbose"]))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("cargo does not say what it runs on")
}

fn stdout(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("`cargo {}` failed", command.get_args().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" "));
    }
    String::from_utf8(output.stdout).context("cargo's answer is not text")
}

fn messages(output: &str) -> impl Iterator<Item = Result<Message>> {
    let lines = output.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).with_context(|| format!("cannot understand cargo's message {line}")))
}

fn parse_test_executables(output: &str) -> Result<Vec<TestExecutable>> {
    let mut found = Vec::new();
    for message in messages(output) {
        let message = message?;
        if message.reason != "compiler-artifact" || !message.profile.is_some_and(|profile| profile.test) {
            continue;
        }
        if let (Some(path), Some(manifest), Some(target)) = (message.executable, message.manifest_path, message.target)
        {
            let package_dir = manifest.parent().context("a package's manifest has no directory")?.to_owned();
            found.push(TestExecutable { target: target.name, path, package_dir });
        }
    }
    Ok(found)
}

fn parse_binary(output: &str, name: &str) -> Result<PathBuf> {
    for message in messages(output) {
        let message = message?;
        // The executable with the tests of a program has its name and kind too.
        let is_test = message.profile.is_some_and(|profile| profile.test);
        let wanted = !is_test && message.target.is_some_and(|target| target.name == name && target.kind == ["bin"]);
        if let (true, Some(path)) = (wanted, message.executable) {
            return Ok(path);
        }
    }
    bail!("cargo built {name} but does not say where it is")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = r#"
{"reason":"compiler-artifact","package_id":"path+file:///w#dep@1.0.0","manifest_path":"/w/dep/Cargo.toml","target":{"kind":["lib"],"crate_types":["lib"],"name":"dep","src_path":"/w/dep/src/lib.rs","edition":"2024"},"profile":{"opt_level":"0","debuginfo":1,"debug_assertions":true,"overflow_checks":true,"test":false},"features":[],"filenames":["/t/libdep.rlib"],"executable":null,"fresh":true}
{"reason":"compiler-artifact","package_id":"path+file:///w#a@1.0.0","manifest_path":"/w/a/Cargo.toml","target":{"kind":["bin"],"crate_types":["bin"],"name":"kube-ipvs","src_path":"/w/a/src/main.rs","edition":"2024"},"profile":{"opt_level":"0","debuginfo":1,"debug_assertions":true,"overflow_checks":true,"test":true},"features":[],"filenames":["/t/kube_ipvs-1"],"executable":"/t/kube_ipvs-1","fresh":false}
{"reason":"compiler-artifact","package_id":"path+file:///w#a@1.0.0","manifest_path":"/w/a/Cargo.toml","target":{"kind":["bin"],"crate_types":["bin"],"name":"kube-ipvs","src_path":"/w/a/src/main.rs","edition":"2024"},"profile":{"opt_level":"0","debuginfo":1,"debug_assertions":true,"overflow_checks":true,"test":false},"features":[],"filenames":["/t/kube-ipvs"],"executable":"/t/kube-ipvs","fresh":false}
{"reason":"compiler-artifact","package_id":"path+file:///w#a@1.0.0","manifest_path":"/w/a/Cargo.toml","target":{"kind":["test"],"crate_types":["bin"],"name":"boot","src_path":"/w/a/tests/boot.rs","edition":"2024"},"profile":{"opt_level":"0","debuginfo":1,"debug_assertions":true,"overflow_checks":true,"test":true},"features":[],"filenames":["/t/boot-1"],"executable":"/t/boot-1","fresh":false}
{"reason":"build-script-executed","package_id":"x","linked_libs":[],"linked_paths":[],"cfgs":[],"env":[],"out_dir":"/t/out"}
{"reason":"build-finished","success":true}
"#;

    #[test]
    fn test_executables_are_those_built_with_the_test_profile() {
        let boot = TestExecutable { target: "boot".into(), path: "/t/boot-1".into(), package_dir: "/w/a".into() };
        let unit =
            TestExecutable { target: "kube-ipvs".into(), path: "/t/kube_ipvs-1".into(), package_dir: "/w/a".into() };
        assert_eq!(parse_test_executables(OUTPUT).unwrap(), [unit, boot]);
        assert!(parse_test_executables("{\"reason\":").is_err());
        assert!(parse_test_executables("").unwrap().is_empty());
    }

    #[test]
    fn the_agent_is_found_among_the_artifacts() {
        assert_eq!(parse_binary(OUTPUT, "kube-ipvs").unwrap(), PathBuf::from("/t/kube-ipvs"));
        assert!(parse_binary(OUTPUT, "boot").is_err());
    }
}
