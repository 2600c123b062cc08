//! Where a kernel or its source comes from: a package that is installed, one that apt offers, or one of another release
//! of Debian, from the mirror this machine uses. Nothing is installed for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Context, Error, Result};
use crate::packages;
use crate::progress::Progress;
use crate::version::Version;

/// The releases of Debian, with the kernel each is known to have. Others are looked for in the newest first.
const RELEASES: [(&str, Option<Version>); 6] = [
    ("sid", None),
    ("trixie", Some(Version::new(6, 12))),
    ("trixie-backports", None),
    ("bookworm", Some(Version::new(6, 1))),
    ("bookworm-backports", None),
    ("bullseye", Some(Version::new(5, 10))),
];

/// Signs every release of Debian. Without it apt uses whatever it trusts by default.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The release whose kernel this distribution has.
pub(crate) fn own_version() -> Result<Version> {
    /// What was tried first on every release that has it.
    const PREFERRED: Version = Version::new(6, 1);
    if !Path::new("/usr/bin/dpkg-query").exists() {
        return Err(Error::Usage(
            "the guest's kernel is built from a package of Debian or Ubuntu, and this is neither: set \
             KUBE_IPVS_LAB_KERNEL to a User-Mode Linux built with crates/lab/guest/kernel.config"
                .into(),
        ));
    }
    let find = || {
        if installed(PREFERRED).is_some() || offered(PREFERRED, &Apt::System).is_some() {
            return Some(PREFERRED);
        }
        dependency(&packages::query("apt-cache", ["depends", "--important", "linux-source"]))
    };
    if let Some(version) = find() {
        return Ok(version);
    }
    if packages::is_root() {
        packages::update()?;
    }
    find().ok_or_else(|| {
        Error::Usage(
            "apt knows no package linux-source: run `apt-get update`, check the package sources of this machine, or \
             set KUBE_IPVS_LAB_KERNEL to a User-Mode Linux built with crates/lab/guest/kernel.config"
                .into(),
        )
    })
}

/// The archive with the source of this release; what has to be fetched is put into the directory.
pub(crate) fn archive(version: Version, dir: &Path) -> Result<PathBuf> {
    if let Some(archive) = installed(version) {
        return Ok(archive);
    }
    let (package, apt) = find(version, dir, |apt| offered(version, apt))?;
    let unpacked = fetch(&package, &apt, dir)?;
    archive_in(&unpacked.join("usr/src"), &package)
        .ok_or_else(|| Error::Usage(format!("package {package} has no archive of a kernel's source under /usr/src")))
}

/// The unpacked package with the kernel of this release as Debian builds it.
pub(crate) fn image(version: Version, dir: &Path) -> Result<PathBuf> {
    let (package, apt) = find(version, dir, |apt| {
        let mut command = apt.command("apt-cache");
        let dependencies = packages::checked(command.args(["depends", "--important", "linux-image-amd64"])).ok()?;
        image_package(&dependencies, version)
    })?;
    fetch(&package, &apt, dir)
}

/// The package that `linux-image-amd64` stands for, if it is of this release.
fn image_package(dependencies: &str, version: Version) -> Option<String> {
    let mut names = dependencies.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let is_release = |name: &&str| {
        let rest = name.strip_prefix("linux-image-").and_then(|rest| rest.strip_prefix(&version.to_string()));
        rest.is_some_and(|rest| rest.starts_with(['.', '-', '+']))
    };
    names.find(is_release).map(str::to_owned)
}

/// Finds a package in apt as this machine has it, or else in the releases of Debian.
fn find(version: Version, dir: &Path, lookup: impl Fn(&Apt) -> Option<String>) -> Result<(String, Apt)> {
    if let Some(package) = lookup(&Apt::System) {
        return Ok((package, Apt::System));
    }
    let mut releases = RELEASES;
    releases.sort_by_key(|(_, has)| (*has != Some(version), has.is_some()));
    let mut reasons = Vec::new();
    for mirror in debian_mirrors() {
        for (release, _) in releases {
            let progress = Progress::start(format_args!("looking for Linux {version} in Debian {release}"));
            match Apt::release(&mirror, release, &dir.join(release)) {
                Ok(apt) => {
                    progress.done();
                    if let Some(package) = lookup(&apt) {
                        return Ok((package, apt));
                    }
                }
                Err(error) => reasons.push(error.to_string()),
            }
        }
    }
    let reasons = if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join("; ")) };
    Err(Error::Usage(format!(
        "no package with Linux {version} is installed, known to apt, or in another release of Debian on a mirror that \
         this machine uses{reasons}"
    )))
}

/// The archive in an installed package, where Debian or where Ubuntu puts it.
fn installed(version: Version) -> Option<PathBuf> {
    names(version).iter().find_map(|name| archive_in(Path::new("/usr/src"), name))
}

fn archive_in(dir: &Path, name: &str) -> Option<PathBuf> {
    ["xz", "bz2", "gz"]
        .iter()
        .flat_map(|end| [format!("{name}.tar.{end}"), format!("{name}/{name}.tar.{end}")])
        .map(|file| dir.join(file))
        .find(|path| path.is_file())
}

/// What Debian and what Ubuntu call the package.
fn names(version: Version) -> [String; 2] {
    [format!("linux-source-{version}"), format!("linux-source-{version}.0")]
}

/// The package that has this release, if apt would install one.
fn offered(version: Version, apt: &Apt) -> Option<String> {
    names(version).into_iter().find(|name| apt.offers(name))
}

/// Downloads and unpacks a package, without installing it.
fn fetch(package: &str, apt: &Apt, dir: &Path) -> Result<PathBuf> {
    let progress = Progress::start(format_args!("fetching {package}"));
    let download = dir.join("download");
    let unpacked = dir.join("unpacked");
    fs::create_dir_all(&download).context("create", download.display())?;
    // apt checks what it downloads against the signed list of the release.
    packages::checked(apt.command("apt-get").args(["--quiet", "download", package]).current_dir(&download))?;
    let mut entries = fs::read_dir(&download).context("read", download.display())?.filter_map(Result::ok);
    let file = entries.find(|entry| entry.path().extension().is_some_and(|end| end == "deb"));
    let file = file.ok_or_else(|| Error::Usage(format!("apt-get downloaded no {package}")))?.path();
    packages::checked(Command::new("dpkg-deb").arg("--extract").args([&file, &unpacked]))?;
    fs::remove_file(&file).context("remove", file.display())?;
    progress.done();
    Ok(unpacked)
}

/// The apt of this machine, or one that knows another release and nothing else.
pub(crate) enum Apt {
    System,
    Release(Vec<String>),
}

impl Apt {
    /// Gets the list of a release into a directory of our own; nothing of the system's changes, and root is not needed.
    fn release(mirror: &str, release: &str, dir: &Path) -> Result<Self> {
        Self::with(mirror, release, dir, Vec::new())
    }

    /// As for a machine on which nothing is installed and that has the packages of another architecture too.
    pub(crate) fn foreign(mirror: &str, release: &str, dir: &Path, architecture: &str) -> Result<Self> {
        let status = dir.join("status");
        fs::create_dir_all(dir).context("create", dir.display())?;
        fs::write(&status, "").context("write", status.display())?;
        let options = vec![
            format!("Dir::State::Status={}", status.display()),
            "APT::Architectures::=amd64".into(),
            format!("APT::Architectures::={architecture}"),
            "APT::Install-Recommends=false".into(),
        ];
        Self::with(mirror, release, dir, options)
    }

    fn with(mirror: &str, release: &str, dir: &Path, more: Vec<String>) -> Result<Self> {
        let list = dir.join("sources.list");
        for dir in [dir.join("lists/partial"), dir.join("cache/archives/partial")] {
            fs::create_dir_all(&dir).context("create", dir.display())?;
        }
        fs::write(&list, source_line(mirror, release, Path::new(KEYRING).exists())).context("write", list.display())?;
        let mut options = vec![
            format!("Dir::Etc::SourceList={}", list.display()),
            "Dir::Etc::SourceParts=-".into(),
            format!("Dir::State::Lists={}", dir.join("lists").display()),
            format!("Dir::Cache={}", dir.join("cache").display()),
            "Acquire::Languages=none".into(),
            "Acquire::Retries=1".into(),
            "Acquire::http::Timeout=20".into(),
            // Otherwise a mirror that does not answer is only a warning.
            "APT::Update::Error-Mode=any".into(),
        ];
        options.extend(more);
        let apt = Self::Release(options);
        packages::checked(apt.command("apt-get").args(["--quiet", "update"]))?;
        Ok(apt)
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        if let Self::Release(options) = self {
            command.args(options.iter().flat_map(|option| ["-o", option]));
        }
        command
    }

    fn offers(&self, package: &str) -> bool {
        self.candidate(package).is_some()
    }

    /// The version that it would install.
    pub(crate) fn candidate(&self, package: &str) -> Option<String> {
        let policy = packages::checked(self.command("apt-cache").args(["policy", package])).ok()?;
        packages::parse_candidate(&policy)
    }
}

const INDEX_TARGETS: [&str; 4] =
    ["indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"];

/// The mirrors of Debian that this machine's own release comes from; none where it is not Debian.
pub(crate) fn debian_mirrors() -> Vec<String> {
    mirrors(&os_release(), &packages::query("apt-get", INDEX_TARGETS))
}

fn mirrors(os_release: &str, index_targets: &str) -> Vec<String> {
    let value =
        |name: &str| os_release.lines().find_map(|line| line.strip_prefix(name)).map(|text| text.trim_matches('"'));
    if value("ID=") != Some("debian") {
        return Vec::new();
    }
    let own = value("VERSION_CODENAME=");
    let mut found: Vec<String> = Vec::new();
    for line in index_targets.lines() {
        let mut words = line.split(' ');
        let (Some(uri), Some(release), Some("main")) = (words.next(), words.next(), words.next()) else { continue };
        let named = ["sid", "unstable", "testing", "stable", "oldstable"].contains(&release);
        if (named || Some(release) == own) && !found.iter().any(|known| known == uri) {
            found.push(uri.to_owned());
        }
    }
    found
}

fn source_line(mirror: &str, release: &str, keyring: bool) -> String {
    let signed_by = if keyring { format!("[signed-by={KEYRING}] ") } else { String::new() };
    format!("deb {signed_by}{mirror} {release} main\n")
}

fn os_release() -> String {
    fs::read_to_string("/etc/os-release").unwrap_or_default()
}

/// The release that the package `linux-source` stands for.
fn dependency(listing: &str) -> Option<Version> {
    Version::of_package(listing.lines().find_map(|line| line.trim().strip_prefix("Depends: "))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apt_says_which_kernel_the_distribution_has() {
        assert_eq!(dependency("linux-source\n  Depends: linux-source-6.12\n"), Some(Version::new(6, 12)));
        assert_eq!(dependency("linux-source\n  Depends: linux-source-6.8.0\n"), Some(Version::new(6, 8)));
        assert_eq!(dependency(""), None);
    }

    #[test]
    fn the_kernel_of_a_release_is_that_release_and_none_that_begins_like_it() {
        let dependencies = "linux-image-amd64\n  Depends: linux-image-6.1.0-57-amd64\n";
        assert_eq!(image_package(dependencies, Version::new(6, 1)), Some("linux-image-6.1.0-57-amd64".into()));
        assert_eq!(image_package(&dependencies.replace("6.1.0", "6.12.9"), Version::new(6, 1)), None);
        assert!(
            image_package(
                "  Depends: linux-base-amd64\n  Depends: linux-image-7.2.7+deb14-amd64\n",
                Version::new(7, 2)
            )
            .is_some()
        );
    }

    #[test]
    fn other_releases_come_from_the_mirror_of_this_one_and_from_nowhere_else() {
        let debian = "PRETTY_NAME=\"Debian\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        let targets = "http://mirror.example/debian/ bookworm main\nhttp://mirror.example/debian/ bookworm-updates main\n\
                       http://mirror.example/debian-security/ bookworm-security main\n\
                       https://engine.example/linux/debian/ bookworm stable\nhttps://node.example/ nodistro main\n\
                       http://mirror.example/debian/ bookworm main\n";
        assert_eq!(mirrors(debian, targets), ["http://mirror.example/debian/"]);
        assert!(
            mirrors("ID=ubuntu\nVERSION_CODENAME=noble\n", "http://mirror.example/ubuntu/ noble main\n").is_empty()
        );
        assert_eq!(
            source_line("http://mirror.example/debian/", "sid", true),
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian/ sid main\n"
        );
    }
}
