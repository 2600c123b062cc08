//! A directory of manifests as a source, on a real directory with real inotify.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::{Listener, labelled, listen, node, of_service, service, slice};
use serde_json::{Value, json};
use service_watch::{Error, Manifests, Report, Source, Subject};
use tempfile::TempDir;

/// Longer than changes are collected for.
const A_WHILE: Duration = Duration::from_millis(250);

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn follow(directory: &Path) -> Listener {
    listen(Source::Manifests(Manifests::new(directory, "node-a")))
}

fn write(directory: &TempDir, name: &str, content: &Value) -> PathBuf {
    let path = directory.path().join(name);
    fs::write(&path, content.to_string()).unwrap();
    path
}

fn problem_of(report: &Report, path: &Path) -> String {
    assert_eq!(report.subject, Subject::File(path.to_owned()));
    assert_eq!(report.problems.len(), 1, "{report:?}");
    report.problems[0].clone()
}

#[tokio::test]
async fn an_empty_directory_is_synced_at_once() {
    let directory = directory();
    assert_eq!(follow(directory.path()).change().await, "synced");
}

#[tokio::test]
async fn a_missing_directory_is_an_error_with_its_path() {
    for path in ["/nonexistent/manifests", "/dev/null"] {
        let error = follow(Path::new(path)).task.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Directory { .. }), "{error:?}");
        assert!(error.to_string().contains(path) && error.to_string().contains("check that"), "{error}");
    }
}

#[tokio::test]
async fn all_kinds_of_files_and_documents_are_read() {
    let directory = directory();
    fs::write(
        directory.path().join("one.yaml"),
        "# comment\n---\napiVersion: v1\nkind: Service\nmetadata: {name: one}\nspec:\n  clusterIP: 10.96.0.1\n---\n---\n\
         apiVersion: v1\nkind: Service\nmetadata:\n  name: two\n  namespace: other\nspec: {clusterIP: 'fd00::2'}\n",
    )
    .unwrap();
    write(&directory, "two.json", &service("three", "10.96.0.3"));
    let json_documents = format!("{}\n{}", service("four", "10.96.0.4"), slice("four-1", "four", &["10.0.0.4"]));
    fs::write(directory.path().join("three.json"), json_documents).unwrap();
    let items = json!([service("five", "10.96.0.5"), { "kind": "ConfigMap", "apiVersion": "v1" }, node("node-a", "z")]);
    write(&directory, "four.yml", &json!({ "apiVersion": "v1", "kind": "List", "items": items }));
    // Items of typed lists may come without kind, as from the API server.
    let mut bare = service("six", "10.96.0.6");
    bare.as_object_mut().unwrap().retain(|key, _| key == "metadata" || key == "spec");
    write(&directory, "five.yaml", &json!({ "apiVersion": "v1", "kind": "ServiceList", "items": [bare] }));
    let slices = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "items": [slice("s", "six", &["10.0.0.6"])],
    });
    write(&directory, "six.yaml", &slices);
    // Not read: other names, hidden files, directories, other kinds of the same name.
    write(&directory, "readme.txt", &service("txt", "10.96.0.9"));
    write(&directory, ".hidden.yaml", &service("hidden", "10.96.0.9"));
    fs::create_dir(directory.path().join("sub.yaml")).unwrap();
    write(&directory, "node-b.yaml", &node("node-b", "z"));
    let knative = json!({ "apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": { "name": "kn" } });
    write(&directory, "knative.yaml", &knative);

    let mut listener = follow(directory.path());
    assert_eq!(
        listener.synced().await,
        [
            "five 10.96.0.5",
            "four 10.96.0.4",
            "four-1 of four: 10.0.0.4",
            "node z",
            "one 10.96.0.1",
            "peer node-b",
            "s of six: 10.0.0.6",
            "six 10.96.0.6",
            "three 10.96.0.3",
            "two fd00::2",
        ]
    );
    assert_eq!(listener.reports, []);
    listener.quiet(A_WHILE).await;
}

#[tokio::test]
async fn created_changed_and_deleted_files_are_noticed() {
    let directory = directory();
    let mut listener = follow(directory.path());
    assert_eq!(listener.synced().await, [""; 0]);
    let path = write(&directory, "a.yaml", &service("a", "10.96.0.1"));
    assert_eq!(listener.change().await, "a 10.96.0.1");
    write(&directory, "a.yaml", &service("a", "10.96.0.2"));
    assert_eq!(listener.change().await, "a 10.96.0.2");
    // As editors and package managers write: beside it, then renamed over it.
    let beside = write(&directory, ".a.yaml.tmp", &service("a", "10.96.0.3"));
    fs::rename(&beside, &path).unwrap();
    assert_eq!(listener.change().await, "a 10.96.0.3");
    // The same again is no change.
    write(&directory, "a.yaml", &service("a", "10.96.0.3"));
    listener.quiet(A_WHILE).await;
    fs::rename(&path, directory.path().join("b.yaml")).unwrap();
    listener.quiet(A_WHILE).await;
    fs::remove_file(directory.path().join("b.yaml")).unwrap();
    assert_eq!(listener.change().await, "-a");
}

#[tokio::test]
async fn other_nodes_are_peer_nodes() {
    let directory = directory();
    write(&directory, "b.yaml", &node("node-b", "z"));
    let mut listener = follow(directory.path());
    assert_eq!(listener.synced().await, ["peer node-b"]);
    write(&directory, "a.yaml", &node("node-a", "z"));
    assert_eq!(listener.change().await, "node z");
    let mut moved = node("node-b", "z");
    moved["status"]["addresses"] = json!([{ "type": "InternalIP", "address": "192.168.10.99" }]);
    write(&directory, "b.yaml", &moved);
    assert_eq!(listener.change().await, "peer node-b");
    // The zone of another is nobody's concern.
    moved["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!("y");
    write(&directory, "b.yaml", &moved);
    listener.quiet(A_WHILE).await;
    // A file whose Node gets another name.
    write(&directory, "b.yaml", &node("node-c", "z"));
    assert_eq!(listener.changes(2).await, ["-peer node-b", "peer node-c"]);
    fs::remove_file(directory.path().join("b.yaml")).unwrap();
    assert_eq!(listener.change().await, "-peer node-c");
    fs::remove_file(directory.path().join("a.yaml")).unwrap();
    assert_eq!(listener.change().await, "-node");
}

#[tokio::test]
async fn simultaneous_changes_are_sent_together_deletions_first() {
    let directory = directory();
    write(&directory, "old.yaml", &service("old", "10.96.0.1"));
    let mut listener = follow(directory.path());
    listener.synced().await;
    write(&directory, "a.yaml", &service("a", "10.96.0.1"));
    fs::remove_file(directory.path().join("old.yaml")).unwrap();
    assert_eq!(listener.change().await, "-old");
    assert_eq!(listener.change().await, "a 10.96.0.1");
}

#[tokio::test]
async fn an_unparsable_file_keeps_its_objects_and_is_reported_once() {
    let directory = directory();
    let path = write(&directory, "a.yaml", &service("a", "10.96.0.1"));
    let mut listener = follow(directory.path());
    listener.synced().await;
    for broken in ["{ not yaml: [", "{ not yaml: ["] {
        fs::write(&path, broken).unwrap();
        tokio::time::sleep(A_WHILE).await;
    }
    let problem = problem_of(&listener.report().await, &path);
    assert!(problem.contains("does not parse") && problem.contains("its last valid content stays in use"), "{problem}");
    assert!(!problem.contains('\n'), "{problem}");
    // Neither the objects nor a second report.
    listener.quiet(A_WHILE).await;
    write(&directory, "a.yaml", &service("a", "10.96.0.2"));
    assert_eq!(listener.change().await, "a 10.96.0.2");
    assert_eq!(listener.report().await, Report { subject: Subject::File(path.clone()), problems: vec![] });
    // A broken file that is removed takes its objects away all the same.
    fs::write(&path, "{").unwrap();
    problem_of(&listener.report().await, &path);
    fs::remove_file(&path).unwrap();
    assert_eq!(listener.change().await, "-a");
    assert_eq!(listener.report().await.problems, [""; 0]);
}

#[tokio::test]
async fn an_unparsable_file_at_the_start_does_not_delay_the_others() {
    let directory = directory();
    let broken = directory.path().join("a.json");
    fs::write(&broken, r#"{"kind": "Service""#).unwrap();
    write(&directory, "b.yaml", &service("b", "10.96.0.1"));
    let source = Source::Manifests(Manifests::new(directory.path(), "node-a"));
    let counters = source.counters();
    let mut listener = listen(source);
    assert_eq!(listener.synced().await, ["b 10.96.0.1", "incomplete"]);
    let problem = problem_of(&listener.reports[0], &broken);
    assert!(problem.contains("nothing is removed until it is corrected"), "{problem}");
    assert_eq!((counters.errors(), counters.lists(), counters.changes()), (1, 1, 3));
}

#[tokio::test]
async fn a_file_that_never_parsed_makes_the_state_incomplete() {
    let directory = directory();
    let first = write(&directory, "a.yaml", &json!("no object"));
    fs::write(&first, "{").unwrap();
    let mut listener = follow(directory.path());
    // Before anything is programmed.
    assert_eq!(listener.changes(2).await, ["incomplete", "synced"]);
    // Further unparsable files change nothing, and readable ones are applied.
    let second = directory.path().join("b.yaml");
    fs::write(&second, "{").unwrap();
    fs::write(&first, "{ {").unwrap();
    write(&directory, "c.yaml", &service("c", "10.96.0.3"));
    assert_eq!(listener.change().await, "c 10.96.0.3");
    // Both must be resolved: one is corrected, the other removed.
    write(&directory, "a.yaml", &service("a", "10.96.0.1"));
    assert_eq!(listener.change().await, "a 10.96.0.1");
    fs::remove_file(&second).unwrap();
    assert_eq!(listener.change().await, "complete");
    // A file that was valid and is now unparsable keeps its objects.
    listener.unchanged(A_WHILE).await;
    listener.reports.clear();
    fs::write(&first, "{").unwrap();
    let problem = problem_of(&listener.report().await, &first);
    assert!(problem.ends_with("its last valid content stays in use"), "{problem}");
    // A renamed unparsable file: incomplete is sent before the deletion.
    fs::rename(&first, &second).unwrap();
    assert_eq!(listener.change().await, "incomplete");
    assert_eq!(listener.change().await, "-a");
    fs::remove_file(&second).unwrap();
    assert_eq!(listener.change().await, "complete");
    listener.unchanged(A_WHILE).await;
}

#[tokio::test]
async fn an_object_that_never_was_valid_makes_the_state_incomplete() {
    let directory = directory();
    let odd = service("odd", "nonsense");
    write(&directory, "b.yaml", &odd);
    let mut listener = follow(directory.path());
    assert_eq!(listener.changes(2).await, ["incomplete", "synced"]);
    let report = listener.report().await;
    assert!(of_service(&report, "odd"), "{report:?}");
    let is_true = "nothing is removed until it is corrected";
    assert!(report.problems.iter().any(|problem| problem.contains(is_true)), "{report:?}");
    assert!(!report.problems.iter().any(|problem| problem.contains("last valid version stays in use")), "{report:?}");
    // Read again it is as it was.
    write(&directory, "b.yaml", &odd);
    listener.quiet(A_WHILE).await;
    // A valid definition in a file that sorts first wins.
    let first = write(&directory, "a.yaml", &service("odd", "10.96.0.1"));
    assert_eq!(listener.changes(2).await, ["complete", "odd 10.96.0.1"]);
    fs::remove_file(&first).unwrap();
    assert_eq!(listener.change().await, "incomplete");
    assert_eq!(listener.change().await, "-odd");
    write(&directory, "b.yaml", &service("odd", "10.96.0.2"));
    assert_eq!(listener.change().await, "odd 10.96.0.2");
    assert_eq!(listener.change().await, "complete");
    // An object that was valid keeps its last valid version.
    write(&directory, "b.yaml", &odd);
    tokio::time::sleep(A_WHILE).await;
    fs::remove_file(directory.path().join("b.yaml")).unwrap();
    assert_eq!(listener.change().await, "-odd");
    listener.unchanged(A_WHILE).await;
}

#[tokio::test]
async fn fields_that_an_api_server_would_set_are_reported_if_missing() {
    let directory = directory();
    let mut bare = service("bare", "");
    bare["spec"].as_object_mut().unwrap().remove("clusterIP");
    let mut alone = slice("alone", "web", &["10.0.0.1"]);
    alone["metadata"].as_object_mut().unwrap().remove("labels");
    let external = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "external" },
        "spec": { "type": "ExternalName", "externalName": "a.example" },
    });
    let headless = service("headless", "None");
    let items = json!([bare, alone, external, headless]);
    write(&directory, "a.yaml", &json!({ "apiVersion": "v1", "kind": "List", "items": items }));
    let mut listener = follow(directory.path());
    assert_eq!(listener.synced().await, [""; 0]);
    let mut messages: Vec<String> =
        listener.reports.iter().map(|report| format!("{} {}", report.subject, report.problems.join(", "))).collect();
    messages.sort();
    assert_eq!(
        messages,
        [
            "EndpointSlice default/alone has no label kubernetes.io/service-name, so it belongs to no Service: skipped; \
             set it to the Service's name",
            "Service default/bare has no spec.clusterIP, and no API server is there to assign one: skipped; set \
             spec.clusterIP to an address",
        ]
    );
}

#[tokio::test]
async fn invalid_parts_are_reported_and_the_rest_is_served() {
    let directory = directory();
    let mut odd = service("odd", "10.96.0.1");
    odd["spec"]["ports"] = json!([{ "port": "x" }, { "port": 443 }]);
    let path = directory.path().join("a.yaml");
    fs::write(&path, format!("{odd}\n---\n[1]\n---\n{{\"kind\": \"Service\", \"apiVersion\": \"v1\"}}\n---\na: b"))
        .unwrap();
    let mut listener = follow(directory.path());
    assert_eq!(listener.synced().await, ["odd 10.96.0.1"]);
    assert_eq!(listener.reports.len(), 2, "{:?}", listener.reports);
    assert!(of_service(&listener.reports[0], "odd"));
    assert!(listener.reports[0].problems[0].contains("spec.ports[0].port"), "{:?}", listener.reports);
    let file = &listener.reports[1].problems;
    assert_eq!(file.len(), 3, "{file:?}");
    assert!(
        file[0].contains("document 2 is not an object") && file[1].contains("document 3: has no usable metadata.name")
    );
    assert!(file[2].contains("document 4 has no apiVersion or no kind"), "{file:?}");
    listener.reports.clear();
    // An object that becomes broken as a whole stays as it was.
    odd["spec"]["clusterIP"] = json!("nonsense");
    fs::write(&path, odd.to_string()).unwrap();
    assert!(listener.report().await.problems.iter().any(|problem| problem.contains("last valid version stays in use")));
    assert_eq!(listener.report().await, Report { subject: Subject::File(path), problems: vec![] });
    listener.quiet(A_WHILE).await;
}

#[tokio::test]
async fn an_object_that_is_no_longer_served_is_deleted() {
    let directory = directory();
    let (web, its_slice) = (service("web", "10.96.0.1"), slice("web-1", "web", &["10.0.0.1"]));
    write(&directory, "service.yaml", &web);
    write(&directory, "slice.yaml", &its_slice);
    write(&directory, "node.yaml", &node("node-a", "z"));
    let mut listener = follow(directory.path());
    assert_eq!(listener.synced().await.len(), 3);
    write(&directory, "service.yaml", &service("web", "None"));
    assert_eq!(listener.change().await, "-web");
    write(&directory, "service.yaml", &web);
    assert_eq!(listener.change().await, "web 10.96.0.1");
    write(&directory, "service.yaml", &labelled(web, "service.kubernetes.io/service-proxy-name", ""));
    assert_eq!(listener.change().await, "-web");
    write(&directory, "slice.yaml", &labelled(its_slice.clone(), "service.kubernetes.io/headless", ""));
    assert_eq!(listener.change().await, "-slice web-1");
    write(&directory, "slice.yaml", &labelled(its_slice.clone(), "kubernetes.io/service-name", "other"));
    assert_eq!(listener.change().await, "web-1 of other: 10.0.0.1");
    write(&directory, "slice.yaml", &labelled(its_slice, "kubernetes.io/service-name", ""));
    assert_eq!(listener.change().await, "-slice web-1");
    fs::remove_file(directory.path().join("node.yaml")).unwrap();
    assert_eq!(listener.change().await, "-node");
}

#[tokio::test]
async fn of_two_files_with_one_object_the_first_wins_until_deleted() {
    let directory = directory();
    let first = write(&directory, "a.yaml", &service("web", "10.96.0.1"));
    let second = write(&directory, "b.yaml", &service("web", "10.96.0.2"));
    let mut listener = follow(directory.path());
    assert_eq!(listener.synced().await, ["web 10.96.0.1"]);
    let report = listener.report().await;
    let problem = problem_of(&report, &second);
    assert!(problem.contains("Service default/web") && problem.contains("a.yaml"), "{problem}");
    // What the second says does not matter, until the first is gone.
    write(&directory, "b.yaml", &service("web", "10.96.0.3"));
    listener.quiet(A_WHILE).await;
    fs::remove_file(&first).unwrap();
    assert_eq!(listener.change().await, "web 10.96.0.3");
    assert_eq!(listener.report().await, Report { subject: Subject::File(second), problems: vec![] });
    // A file that sorts before takes over.
    write(&directory, "0.yaml", &service("web", "10.96.0.4"));
    assert_eq!(listener.change().await, "web 10.96.0.4");
    // Twice in one file: the first.
    let twice =
        json!({ "apiVersion": "v1", "kind": "List", "items": [service("x", "10.96.1.1"), service("x", "10.96.1.2")] });
    let path = write(&directory, "x.yaml", &twice);
    assert_eq!(listener.change().await, "x 10.96.1.1");
    listener.reports.retain(|report| report.subject == Subject::File(path.clone()));
    assert!(problem_of(&listener.report().await, &path).contains("more than once"));
}

#[tokio::test]
async fn a_swapped_config_map_is_read_again() {
    // As the kubelet mounts one: names link to ..data, which links to a directory of one version.
    let directory = directory();
    let version = |name: &str, files: &[(&str, Value)]| {
        let path = directory.path().join(name);
        fs::create_dir(&path).unwrap();
        for (file, content) in files {
            fs::write(path.join(file), content.to_string()).unwrap();
        }
    };
    let swap = |name: &str| {
        symlink(name, directory.path().join("..data_tmp")).unwrap();
        fs::rename(directory.path().join("..data_tmp"), directory.path().join("..data")).unwrap();
    };
    version("..v1", &[("a.yaml", service("a", "10.96.0.1")), ("b.yaml", service("b", "10.96.0.2"))]);
    swap("..v1");
    symlink("..data/a.yaml", directory.path().join("a.yaml")).unwrap();
    symlink("..data/b.yaml", directory.path().join("b.yaml")).unwrap();
    let mut listener = follow(directory.path());
    assert_eq!(listener.synced().await, ["a 10.96.0.1", "b 10.96.0.2"]);

    version("..v2", &[("a.yaml", service("a", "10.96.0.3")), ("c.yaml", service("c", "10.96.0.4"))]);
    swap("..v2");
    symlink("..data/c.yaml", directory.path().join("c.yaml")).unwrap();
    fs::remove_file(directory.path().join("b.yaml")).unwrap();
    assert_eq!(listener.changes(3).await, ["-b", "a 10.96.0.3", "c 10.96.0.4"]);
}

#[tokio::test]
async fn a_dangling_link_keeps_its_objects_and_is_reported() {
    let outside = directory();
    let target = write(&outside, "target", &service("a", "10.96.0.1"));
    let directory = directory();
    let link = directory.path().join("a.yaml");
    let mut listener = follow(directory.path());
    listener.synced().await;
    symlink(&target, &link).unwrap();
    assert_eq!(listener.change().await, "a 10.96.0.1");
    symlink("/nonexistent", directory.path().join("new")).unwrap();
    fs::rename(directory.path().join("new"), &link).unwrap();
    assert!(problem_of(&listener.report().await, &link).contains("link to a file that does not exist"));
    listener.quiet(A_WHILE).await;
}

#[tokio::test]
async fn a_file_is_read_when_it_is_closed_after_writing() {
    use std::io::Write as _;
    let directory = directory();
    let mut listener = follow(directory.path());
    listener.synced().await;
    let text = service("a", "10.96.0.1").to_string();
    let mut file = fs::File::create(directory.path().join("a.yaml")).unwrap();
    file.write_all(&text.as_bytes()[..20]).unwrap();
    listener.quiet(A_WHILE).await;
    file.write_all(&text.as_bytes()[20..]).unwrap();
    drop(file);
    assert_eq!(listener.change().await, "a 10.96.0.1");
    assert_eq!(listener.reports, []);
}

#[tokio::test]
async fn a_missing_directory_keeps_its_objects_until_it_is_back() {
    let parent = directory();
    let path = parent.path().join("manifests");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), service("a", "10.96.0.1").to_string()).unwrap();
    let mut listener = follow(&path);
    listener.synced().await;
    fs::rename(&path, parent.path().join("elsewhere")).unwrap();
    assert!(problem_of(&listener.report().await, &path).contains("cannot be read"));
    listener.quiet(A_WHILE).await;
    fs::create_dir(&path).unwrap();
    fs::write(path.join("b.yaml"), service("b", "10.96.0.2").to_string()).unwrap();
    assert_eq!(listener.report().await, Report { subject: Subject::File(path.clone()), problems: vec![] });
    assert_eq!(listener.changes(2).await, ["-a", "b 10.96.0.2"]);
    // And is followed again, the new one only.
    fs::write(parent.path().join("elsewhere").join("c.yaml"), service("c", "10.96.0.3").to_string()).unwrap();
    listener.quiet(A_WHILE).await;
    fs::write(path.join("d.yaml"), service("d", "10.96.0.4").to_string()).unwrap();
    assert_eq!(listener.change().await, "d 10.96.0.4");
    // Also if it was never missed.
    fs::rename(&path, parent.path().join("elsewhere as well")).unwrap();
    fs::create_dir(&path).unwrap();
    fs::write(path.join("e.yaml"), service("e", "10.96.0.5").to_string()).unwrap();
    assert_eq!(listener.changes(3).await, ["-b", "-d", "e 10.96.0.5"]);
}

#[tokio::test]
async fn an_empty_directory_in_place_of_a_lost_one_deletes_nothing() {
    let parent = directory();
    let path = parent.path().join("manifests");
    let resolved = Report { subject: Subject::File(path.clone()), problems: vec![] };
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), service("a", "10.96.0.1").to_string()).unwrap();
    let mut listener = follow(&path);
    listener.synced().await;
    fs::rename(&path, parent.path().join("elsewhere")).unwrap();
    fs::create_dir(&path).unwrap();
    let mut report = listener.report().await;
    if report.problems.iter().any(|problem| problem.contains("cannot be read")) {
        // It polled in between.
        report = listener.report().await;
    }
    let problem = problem_of(&report, &path);
    assert!(problem.contains("is back and empty: its last content stays in use; put a file there"), "{problem}");
    // Nor what comes that is no manifest, or is still being written, nor losing it once more.
    fs::write(path.join("notes.txt"), "x").unwrap();
    let file = fs::File::create(path.join("b.yaml")).unwrap();
    listener.quiet(A_WHILE).await;
    fs::remove_file(path.join("b.yaml")).unwrap();
    drop(file);
    fs::remove_dir_all(&path).unwrap();
    assert!(problem_of(&listener.report().await, &path).contains("cannot be read"));
    fs::create_dir(&path).unwrap();
    assert!(problem_of(&listener.report().await, &path).contains("back and empty"));
    listener.quiet(A_WHILE).await;
    fs::write(path.join("b.yaml"), service("b", "10.96.0.2").to_string()).unwrap();
    assert_eq!(listener.changes(2).await, ["-a", "b 10.96.0.2"]);
    assert_eq!(listener.report().await, resolved);
    // In a directory that is not lost, the last file may go.
    fs::remove_file(path.join("b.yaml")).unwrap();
    assert_eq!(listener.change().await, "-b");
    // And then there is nothing to keep.
    fs::remove_dir_all(&path).unwrap();
    assert!(problem_of(&listener.report().await, &path).contains("cannot be read"));
    fs::create_dir(&path).unwrap();
    assert_eq!(listener.report().await, resolved);
    fs::write(path.join("c.yaml"), service("c", "10.96.0.3").to_string()).unwrap();
    assert_eq!(listener.change().await, "c 10.96.0.3");
    // An empty file says that there is nothing to serve.
    fs::rename(&path, parent.path().join("elsewhere as well")).unwrap();
    fs::create_dir(&path).unwrap();
    while !listener.report().await.problems.iter().any(|problem| problem.contains("back and empty")) {}
    fs::write(path.join("none.yaml"), "").unwrap();
    assert_eq!(listener.change().await, "-c");
    assert_eq!(listener.report().await, resolved);
}

#[tokio::test(start_paused = true)]
async fn an_edit_behind_a_link_is_found_within_a_minute() {
    let outside = directory();
    let target = write(&outside, "target", &service("a", "10.96.0.1"));
    let directory = directory();
    let link = directory.path().join("a.yaml");
    symlink(&target, &link).unwrap();
    for i in 0..100 {
        write(&directory, &format!("b{i}.yaml"), &service(&format!("b{i}"), &format!("10.96.1.{i}")));
    }
    fs::create_dir(directory.path().join("sub.yaml")).unwrap();
    let source = Source::Manifests(Manifests::new(directory.path(), "node-a"));
    let counters = source.counters();
    let mut listener = listen(source);
    assert_eq!(listener.synced().await.len(), 101);
    listener.quiet(Duration::from_secs(300)).await;
    let start = tokio::time::Instant::now();
    write(&outside, "target", &service("a", "10.96.0.2"));
    assert_eq!(listener.change().await, "a 10.96.0.2");
    assert!(start.elapsed() < Duration::from_secs(35), "{:?}", start.elapsed());
    // Also one that leaves the size and the time of modification.
    let time = fs::metadata(&target).unwrap().modified().unwrap();
    write(&outside, "target", &service("a", "10.96.0.3"));
    fs::File::options().write(true).open(&target).unwrap().set_modified(time).unwrap();
    assert_eq!(listener.change().await, "a 10.96.0.3");
    // A target that goes leaves a link to nothing, until it is back.
    fs::remove_file(&target).unwrap();
    assert!(problem_of(&listener.report().await, &link).contains("does not exist"));
    listener.quiet(Duration::from_secs(300)).await;
    write(&outside, "target", &service("a", "10.96.0.4"));
    assert_eq!(listener.change().await, "a 10.96.0.4");
    assert_eq!(listener.report().await.problems, [""; 0]);
    // Not by reading everything again.
    assert_eq!(counters.lists(), 1);
}

#[tokio::test(start_paused = true)]
async fn another_directory_at_the_same_path_is_found_within_a_minute() {
    // As with a file system that is mounted over it, inotify says nothing of a link that leads elsewhere.
    let parent = directory();
    let path = parent.path().join("manifests");
    let lead = |name: &str| {
        let beside = parent.path().join("beside");
        symlink(name, &beside).unwrap();
        fs::rename(&beside, &path).unwrap();
    };
    for (name, ip) in [("v1", "10.96.0.1"), ("v2", "10.96.0.2")] {
        fs::create_dir(parent.path().join(name)).unwrap();
        fs::write(parent.path().join(name).join("a.yaml"), service("a", ip).to_string()).unwrap();
    }
    fs::create_dir(parent.path().join("v3")).unwrap();
    lead("v1");
    let mut listener = follow(&path);
    assert_eq!(listener.synced().await, ["a 10.96.0.1"]);
    lead("v2");
    assert_eq!(listener.change().await, "a 10.96.0.2");
    lead("v3");
    assert!(problem_of(&listener.report().await, &path).contains("back and empty"));
    listener.quiet(Duration::from_secs(300)).await;
    lead("v1");
    assert_eq!(listener.change().await, "a 10.96.0.1");
    assert_eq!(listener.report().await.problems, [""; 0]);
}

#[tokio::test]
async fn the_run_ends_when_the_sink_breaks() {
    let directory = directory();
    let listener = follow(directory.path());
    let task = listener.task;
    drop(listener.reports);
    drop(task);
    let mut calls = 0;
    let source = Manifests::new(directory.path(), "node-a");
    let run = source.run(|_| {
        calls += 1;
        std::ops::ControlFlow::Break(())
    });
    run.await.unwrap();
    assert_eq!(calls, 1);
}

#[tokio::test]
async fn a_file_is_read_once_its_permissions_allow() {
    let directory = directory();
    let path = write(&directory, "a.yaml", &service("a", "10.96.0.1"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    let mut listener = follow(directory.path());
    if fs::read(&path).is_ok() {
        // This user may read anything.
        assert_eq!(listener.synced().await, ["a 10.96.0.1"]);
        return;
    }
    assert_eq!(listener.synced().await, ["incomplete"]);
    assert!(problem_of(&listener.report().await, &path).contains("check its permissions"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert_eq!(listener.change().await, "a 10.96.0.1");
    assert_eq!(listener.change().await, "complete");
}
