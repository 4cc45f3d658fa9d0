//! Images from registries and to them, together with skopeo and umoci; and registries that lie.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;

use crate::host::Work;
use crate::images::{digests, layers, layout, same_files, shell, umoci};
use crate::registry_server::{Answer, Asked, Liar, Server, vdisk_with};
use crate::require::{Need, have};

fn copy(work: &Work, from: &str, to: &str) {
    let words = ["copy", "--src-tls-verify=false", "--dest-tls-verify=false", from, to];
    work.run("skopeo", words).succeeds();
}

#[test]
fn what_skopeo_pushed_is_pulled_and_nothing_comes_twice() {
    if !have(Need::Registry) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let server = Server::open(&work);
    let host = &server.host;
    copy(&work, "oci:lay:a", &format!("docker://{host}/some/base:1"));
    copy(&work, "oci:lay:b", &format!("docker://{host}/some/app"));
    // Without https nothing is said unless that is allowed.
    let said = work.vdisk(&format!("pull {host}/some/app --store s")).fails(&[]);
    assert!(said.text().contains("cannot be reached"), "{}", said.text());
    work.vdisk(&format!("pull {host}/some/base:1 --tls-verify=false --store s")).succeeds();
    assert_eq!(server.asked("GET /v2/some/base/blobs/sha256"), 2);
    work.vdisk(&format!("pull {host}/some/app --tls-verify=false --store s")).succeeds();
    assert_eq!(server.asked("GET /v2/some/app/blobs/sha256"), 2, "its own layer and configuration");
    work.vdisk("import oci:lay:b x --store other").succeeds();
    assert_eq!(layers(&work, "s"), layers(&work, "other"));
    work.vdisk(&format!("clone {host}/some/app d.qcow2 --store s")).succeeds();
    same_files(&work, "d.qcow2", "lay:b");
    // By its digest, too, and not by another.
    let said =
        work.run("skopeo", ["inspect", "--tls-verify=false", &format!("docker://{host}/some/app")]);
    let text = said.succeeds().text();
    let digest = &text[text.find("sha256:").unwrap()..][..71];
    work.vdisk(&format!("pull {host}/some/app@{digest} --tls-verify=false --store s")).succeeds();
    let wrong = format!("sha256:{}", "0".repeat(64));
    work.vdisk(&format!("pull {host}/some/app@{wrong} --tls-verify=false --store s"))
        .fails(&["404"]);
    work.vdisk(&format!("pull {host}/some/none --tls-verify=false --store s")).fails(&["404"]);
    // No part of a download is left.
    let hidden = |e: &fs::DirEntry| e.file_name().to_string_lossy().starts_with('.');
    let left = fs::read_dir(work.path("s/blobs/sha256")).unwrap().flatten().filter(hidden).count();
    assert_eq!(left, 0);
}

#[test]
fn a_disk_is_pushed_and_others_read_it() {
    if !have(Need::Registry) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let server = Server::open(&work);
    let host = &server.host;
    copy(&work, "oci:lay:b", &format!("docker://{host}/some/app:1"));
    let plain = "--tls-verify=false --store s";
    work.vdisk(&format!("pull {host}/some/app:1 {plain}")).succeeds();
    work.vdisk(&format!("clone {host}/some/app:1 d.qcow2 --store s")).succeeds();
    fs::create_dir(work.path("m")).unwrap();
    work.vdisk("mount d.qcow2 m").succeeds();
    shell(&work, "cd $1; rm usr/lib/f7; echo new >etc/new; rm -r usr/bin", &work.path("m"));
    work.vdisk("umount m").succeeds();
    let said = work.vdisk(&format!("push d.qcow2 {host}/mine/new:2 {plain} --env A=b --json"));
    let text = said.succeeds().out();
    // Its own layer and the configuration; the others are the registry's already.
    assert!(text.contains("\"sent\": 2") && text.contains("\"mounted\": 2"), "{text}");
    copy(&work, &format!("docker://{host}/mine/new:2"), "oci:back:v");
    same_files(&work, "d.qcow2", "back:v");
    assert!(digests(&work, "back", "v").starts_with(&digests(&work, "lay", "b")));
    let said = work.vdisk(&format!("push d.qcow2 {host}/mine/new:3 {plain} --env A=b --json"));
    assert!(said.succeeds().out().contains("\"sent\": 0"));
    // An image of the store as it came is the same image.
    work.vdisk(&format!("push {host}/some/app:1 {host}/mine/app:1 {plain}")).succeeds();
    copy(&work, &format!("docker://{host}/mine/app:1"), "oci:back:same");
    let config = |layout: &str| {
        let done = work.run("skopeo", ["inspect", "--config", "--raw", layout]).succeeds();
        done.stdout
    };
    assert!(config("oci:back:same") == config("oci:lay:b"));
    // And what was pushed is pulled elsewhere.
    work.vdisk(&format!("pull {host}/mine/new:2 --tls-verify=false --store t")).succeeds();
    work.vdisk(&format!("clone {host}/mine/new:2 e.qcow2 --store t")).succeeds();
    same_files(&work, "e.qcow2", "back:v");
    work.vdisk(&format!("push d.qcow2 {host}/mine/new@sha256:{} {plain}", "0".repeat(64)))
        .fails(&["tag"]);
}

#[test]
fn of_an_image_for_several_platforms_the_right_one_is_pulled() {
    if !have(Need::Registry) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let server = Server::open(&work);
    let host = &server.host;
    let mut entries = Vec::new();
    for (tag, arch) in
        [("a", "s390x"), ("b", if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" })]
    {
        umoci(&work, &format!("config --image lay:{tag} --architecture {arch}"));
        let raw = work.run("skopeo", ["inspect", "--raw", &format!("oci:lay:{tag}")]).succeeds();
        let (digest, size) = blob(&work, "lay", &raw.stdout);
        entries.push(format!(
            r#"{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":{size},"platform":{{"os":"linux","architecture":"{arch}"}}}}"#
        ));
    }
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","));
    let (digest, size) = blob(&work, "lay", index.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.index.v1+json","digest":"{digest}","size":{size},"annotations":{{"org.opencontainers.image.ref.name":"all"}}}}]}}"#
    );
    work.put("lay/index.json", index);
    let to = format!("docker://{host}/many:1");
    work.run("skopeo", ["copy", "--all", "--dest-tls-verify=false", "oci:lay:all", &to]).succeeds();
    let plain = "--tls-verify=false --store s";
    let pull = |more: &str| work.vdisk(&format!("pull {host}/many:1 {plain} {more}"));
    pull("").succeeds();
    assert_eq!(layers(&work, "s").len(), 2);
    pull("--platform linux/s390x").succeeds();
    let shown = work.vdisk(&format!("image show {host}/many:1 --store s --json")).succeeds().out();
    assert!(shown.contains("\"architecture\": \"s390x\""), "{shown}");
    pull("--platform linux/arm/v7").fails(&["linux/arm/v7", "linux/s390x"]);
}

/// Puts a blob into a layout.
fn blob(work: &Work, layout: &str, bytes: &[u8]) -> (String, usize) {
    work.put("blob", bytes);
    let sum = work.run("sha256sum", ["blob"]).succeeds().out()[..64].to_owned();
    work.put(format!("{layout}/blobs/sha256/{sum}"), bytes);
    (format!("sha256:{sum}"), bytes.len())
}

#[test]
fn a_closed_registry_lets_in_whom_it_knows_over_https_alone() {
    if !have(Need::Registry) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let server = Server::closed(&work);
    let host = &server.host;
    let to = format!("docker://{host}/some/app:1");
    let words = ["copy", "--dest-tls-verify=false", "--dest-creds", "u:p", "oci:lay:b", &to];
    work.run("skopeo", words).succeeds();
    let cert = work.path("cert.pem").display().to_string();
    let pull = format!("pull {host}/some/app:1 --store s");
    // `u:p`, and `u:q`.
    let auth = |name: &str, secret: &str| {
        work.put(name, format!(r#"{{"auths":{{"{host}":{{"auth":"{secret}"}}}}}}"#));
        work.path(name).display().to_string()
    };
    let (right, wrong) = (auth("right.json", "dTpw"), auth("wrong.json", "dTpx"));
    let home = ("HOME", "/nonexistent");
    vdisk_with(&work, &[("REGISTRY_AUTH_FILE", &right)], &pull).fails(&["certificate"]);
    vdisk_with(&work, &[("SSL_CERT_FILE", &cert), home], &pull).fails(&["denied", "podman login"]);
    let with = |auth: &'static str, file: &str, words: &str| {
        vdisk_with(&work, &[("SSL_CERT_FILE", cert.as_str()), home, (auth, file)], words)
    };
    with("REGISTRY_AUTH_FILE", &wrong, &pull).fails(&["denied"]);
    with("REGISTRY_AUTH_FILE", "/nonexistent/a.json", &pull).fails(&["a.json"]);
    with("REGISTRY_AUTH_FILE", &right, &pull).succeeds();
    // Podman's place, docker's place, and a helper program.
    for (name, variable) in
        [("containers/auth.json", "XDG_RUNTIME_DIR"), ("config.json", "DOCKER_CONFIG")]
    {
        fs::create_dir_all(work.path(name).parent().unwrap()).unwrap();
        fs::copy(&right, work.path(name)).unwrap();
        let store = format!("pull {host}/some/app:1 --store {variable}");
        with(variable, work.dir().to_str().unwrap(), &store).succeeds();
    }
    work.put("helper.json", format!(r#"{{"credHelpers":{{"{host}":"ours"}}}}"#));
    let helper = "docker-credential-ours";
    work.put(helper, "#!/bin/sh\nread -r asked; echo \"$asked\" >asked; echo '{\"Username\":\"u\",\"Secret\":\"p\"}'\n");
    shell(&work, "chmod +x $1", &work.path(helper));
    let path = format!("{}:{}", work.dir().display(), std::env::var("PATH").unwrap());
    let pull = format!("pull {host}/some/app:1 --store h --authfile helper.json");
    with("PATH", &path, &pull).succeeds();
    assert_eq!(work.bytes("asked"), format!("{host}\n").into_bytes());
    with(
        "PATH",
        &path,
        &format!("push {host}/some/app:1 {host}/new:1 --store h --authfile helper.json"),
    )
    .succeeds();
    vdisk_with(
        &work,
        &[home],
        &format!("push {host}/some/app:1 {host}/new:2 --store h --tls-verify=false"),
    )
    .fails(&["denied"]);
}

/// An image in a layout, as a registry without much sense has it.
fn serve(work: &Work, tag: &str, asked: &Asked) -> Answer {
    let path = asked.what.split_once(' ').unwrap().1;
    let answer = |status, body: Vec<u8>| Answer { status, body, ..Answer::default() };
    if path == "/v2/" {
        return answer(200, Vec::new());
    }
    if path.contains("/manifests/") {
        let index = String::from_utf8(work.bytes("lay/index.json")).unwrap();
        let place = index.find(&format!("\"{tag}\"")).unwrap();
        let digest = index[..place].rfind("sha256:").unwrap() + 7;
        let raw = work.bytes(format!("lay/blobs/sha256/{}", &index[digest..digest + 64]));
        return answer(200, raw);
    }
    match path.rsplit_once("sha256:") {
        Some((_, hex)) if work.path(format!("lay/blobs/sha256/{hex}")).exists() => {
            answer(200, work.bytes(format!("lay/blobs/sha256/{hex}")))
        }
        _ => answer(404, Vec::new()),
    }
}

/// The bytes of the largest blob in the layout, and its name.
fn largest(work: &Work) -> (String, usize) {
    let all = fs::read_dir(work.path("lay/blobs/sha256")).unwrap().flatten();
    let found =
        all.map(|e| (e.file_name().into_string().unwrap(), e.metadata().unwrap().len() as usize));
    found.max_by_key(|(_, len)| *len).unwrap()
}

#[test]
fn an_interrupted_pull_goes_on_from_where_it_was() {
    if !have(Need::Registry) {
        return;
    }
    let work = Arc::new(Work::new());
    layout(&work);
    let (large, len) = largest(&work);
    let tries = Arc::new(AtomicUsize::new(0));
    let (at, name, tried) = (work.clone(), large.clone(), tries.clone());
    let liar = Liar::new(move |asked| {
        let mut answer = serve(&at, "b", asked);
        if asked.what.contains(&name) {
            let from: usize = asked.headers.get("range").map_or(0, |r| {
                r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap()
            });
            if from > 0 {
                answer.status = 206;
                answer.headers.push(format!("Content-Range: bytes {from}-{}/{len}", len - 1));
                answer.body.drain(..from);
            }
            match tried.fetch_add(1, Ordering::Relaxed) {
                // It breaks off,
                0 => answer.cut = Some(len / 3),
                // and then waits until who asks is killed.
                1 => {
                    answer.cut = Some(len / 3);
                    answer.headers.push(format!("Content-Length: {}", answer.body.len()));
                    answer.hold = true;
                }
                _ => {}
            }
        }
        answer
    });
    let words = format!("pull {}/x/y --tls-verify=false --store s", liar.host);
    let running = work.vdisk_start(&words);
    let part = work.path(format!("s/blobs/sha256/.part-{large}"));
    let end = std::time::Instant::now() + crate::host::PATIENCE;
    while fs::metadata(&part).map_or(0, |m| m.len()) < (len / 3 * 2) as u64 {
        assert!(std::time::Instant::now() < end, "it does not go on");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    running.signal(Signal::SIGKILL);
    running.wait();
    assert!(!work.path(format!("s/blobs/sha256/{large}")).exists());
    work.vdisk(&words).succeeds();
    let asked = liar.asked.lock().unwrap();
    let ranges: Vec<String> = asked
        .iter()
        .filter(|a| a.what.contains(&large))
        .map(|a| a.headers.get("range").cloned().unwrap_or_default())
        .collect();
    let range = |from: usize| format!("bytes={from}-");
    assert_eq!(ranges, [String::new(), range(len / 3), range(len / 3 * 2)]);
    drop(asked);
    work.vdisk("import oci:lay:b x --store other").succeeds();
    assert_eq!(layers(&work, "s"), layers(&work, "other"));
    assert!(!Path::new(&part).exists());
}

#[test]
fn a_registry_that_lies_is_refused_and_leaves_nothing() {
    if !have(Need::Registry) {
        return;
    }
    let work = Arc::new(Work::new());
    layout(&work);
    let (large, len) = largest(&work);
    type Lie = fn(&mut Answer, &str);
    let lies: [(&str, &str, Lie); 9] = [
        ("other bytes", "digest", |a, path| {
            if path.contains("LARGE") {
                a.body[9] ^= 1
            }
        }),
        ("more than was said", "more", |a, path| {
            if path.contains("LARGE") {
                a.body.push(0)
            }
        }),
        ("without end", "more", |a, path| a.endless |= path.contains("LARGE")),
        ("a manifest without end", "too long", |a, path| a.endless |= path.contains("/manifests/")),
        ("no manifest", "manifest", |a, path| {
            if path.contains("/manifests/") {
                a.body = b"<html>".to_vec();
            }
        }),
        ("in circles", "on and on", |a, path| {
            if path.contains("LARGE") {
                a.status = 307;
                a.headers.push("Location: /v2/x/y/blobs/sha256:LARGE".to_owned());
            }
        }),
        ("to a file", "https", |a, path| {
            if path.contains("LARGE") {
                a.status = 302;
                a.headers.push("Location: file:///etc/passwd".to_owned());
            }
        }),
        ("less than was said", "broke off", |a, path| {
            if path.contains("LARGE") {
                a.body.truncate(10);
            }
        }),
        ("the wrong middle", "206", |a, path| {
            if path.contains("LARGE") {
                a.status = 206;
                a.body.truncate(10);
                a.headers.push("Content-Range: bytes 0-9/10".to_owned());
            }
        }),
    ];
    for (number, (what, says, lie)) in lies.into_iter().enumerate() {
        let (at, name) = (work.clone(), large.clone());
        let liar = Liar::new(move |asked| {
            let mut answer = serve(&at, "b", asked);
            lie(&mut answer, &asked.what.replace(&name, "LARGE"));
            answer
        });
        let store = format!("s{number}");
        let words = format!("pull {}/x/y --tls-verify=false --store {store}", liar.host);
        let said = work.vdisk(&words).fails(&[]);
        let text = said.text();
        assert!(text.contains(says), "{what}: {text}");
        assert_eq!(work.vdisk(&format!("image list --store {store}")).succeeds().stdout, b"");
        let blob = work.path(format!("{store}/blobs/sha256/{large}"));
        assert!(!blob.exists(), "{what}");
        // What came of it is taken away.
        work.vdisk(&format!("image prune --yes --store {store}")).succeeds();
        assert_eq!(fs::read_dir(blob.parent().unwrap()).unwrap().count(), 0, "{what}");
    }
    assert!(len > 1000);
}

#[test]
fn a_token_is_got_where_the_registry_says_and_goes_nowhere_else() {
    if !have(Need::Registry) {
        return;
    }
    let work = Arc::new(Work::new());
    layout(&work);
    let (at, large) = (work.clone(), largest(&work).0);
    let elsewhere = Liar::new({
        let at = at.clone();
        move |asked| serve(&at, "b", asked)
    });
    let (other, name) = (elsewhere.host.clone(), large.clone());
    let liar = Liar::new(move |asked| {
        let said = asked.headers.get("authorization").map(String::as_str);
        if asked.what.starts_with("GET /token?") {
            let right = said == Some("Basic dTpw")
                && asked.what.contains("service=reg%20x")
                && asked.what.contains("scope=repository%3Ax%2Fy%3Apull");
            let body = if right { br#"{"token":"t1"}"#.to_vec() } else { b"{}".to_vec() };
            return Answer { status: 200, body, ..Answer::default() };
        }
        if said != Some("Bearer t1") {
            let realm = format!("http://{}/token", asked.headers["host"]);
            let wants =
                format!("WWW-Authenticate: Bearer realm=\"{realm}\",service=\"reg x\",scope=\"s\"");
            return Answer { status: 401, headers: vec![wants], ..Answer::default() };
        }
        if asked.what.contains(&name) {
            let to = asked.what.split_once(' ').unwrap().1;
            let to = format!("Location: http://{other}{to}");
            return Answer { status: 307, headers: vec![to], ..Answer::default() };
        }
        serve(&at, "b", asked)
    });
    work.put("auth.json", format!(r#"{{"auths":{{"{}":{{"auth":"dTpw"}}}}}}"#, liar.host));
    let words = format!("pull {}/x/y --tls-verify=false --store s", liar.host);
    work.vdisk(&format!("{words} --authfile auth.json")).succeeds();
    assert_eq!(liar.count("/token?"), 1, "one token is enough");
    assert_eq!(elsewhere.count(&large), 1);
    let asked = elsewhere.asked.lock().unwrap();
    assert!(asked.iter().all(|a| !a.headers.contains_key("authorization")));
    drop(asked);
    work.put("none.json", "{}");
    work.vdisk(&format!("{words}2 --authfile none.json")).fails(&[]);
}

#[test]
fn a_disk_goes_through_a_registry_as_it_is() {
    if !have(Need::Registry) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let server = Server::open(&work);
    let host = &server.host;
    // A disk with a base elsewhere, a snapshot and a branch that stays behind.
    fs::create_dir(work.path("base")).unwrap();
    work.vdisk("create base/base.qcow2 64M").succeeds();
    work.qemu_io("base/base.qcow2", &["write -P 1 0 3M"]).succeeds();
    work.vdisk("clone base/base.qcow2 d.qcow2").succeeds();
    work.qemu_io("d.qcow2", &["write -P 2 1M 1M"]).succeeds();
    work.vdisk("snapshot create d.qcow2 one").succeeds();
    work.qemu_io("d.qcow2", &["write -P 3 2M 64K"]).succeeds();
    let plain = "--tls-verify=false";
    let push = format!("push d.qcow2 {host}/vm/disk:1 --as disk {plain} --json");
    assert!(work.vdisk(&push).succeeds().out().contains("\"sent\": 4"));
    work.vdisk(&format!("pull {host}/vm/disk:1 --to there {plain}")).succeeds();
    let names = |dir: &str| {
        let mut all: Vec<String> = fs::read_dir(work.path(dir))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        all.sort();
        all
    };
    let there = names("there");
    assert_eq!(there.len(), 3);
    // The files are the same but for the way to the base.
    let snapshot = there.iter().find(|n| n.contains('@')).unwrap();
    assert!(work.bytes("there/base.qcow2") == work.bytes("base/base.qcow2"));
    assert!(work.bytes("there/d.qcow2") == work.bytes("d.qcow2"));
    let read = |disk: &str| work.vdisk(&format!("read {disk} 0 64M")).succeeds().stdout;
    assert!(read("there/d.qcow2") == read("d.qcow2"));
    let listed = |disk: &str| work.vdisk(&format!("snapshot list {disk} --json")).succeeds().out();
    assert_eq!(listed("there/d.qcow2").matches("\"one\"").count(), 1);
    for name in &there {
        work.qemu_img(&format!("check there/{name}")).succeeds();
        work.vdisk(&format!("check there/{name}")).succeeds();
    }
    work.vdisk("snapshot revert there/d.qcow2 one --yes").succeeds();
    // What is there already does not come, and is not sent, again.
    work.qemu_io("d.qcow2", &["write -P 4 3M 64K"]).succeeds();
    assert!(work.vdisk(&push).succeeds().out().contains("\"sent\": 1"));
    fs::remove_file(work.path("there/d.qcow2")).unwrap();
    let before = server.asked("GET /v2/vm/disk/blobs");
    work.vdisk(&format!("pull {host}/vm/disk:1 --to there {plain}")).succeeds();
    assert_eq!(server.asked("GET /v2/vm/disk/blobs") - before, 1);
    assert!(read("there/d.qcow2") == read("d.qcow2"));
    // What is another's is left alone, and each is named that is the wrong kind.
    fs::remove_file(work.path(format!("there/{snapshot}"))).unwrap();
    work.put(format!("there/{snapshot}"), "mine");
    work.vdisk(&format!("pull {host}/vm/disk:1 --to there {plain}")).fails(&["is there", snapshot]);
    assert_eq!(work.bytes(format!("there/{snapshot}")), b"mine");
    work.vdisk(&format!("pull {host}/vm/disk:1 --store s {plain}")).fails(&["--to"]);
    copy(&work, "oci:lay:a", &format!("docker://{host}/some/base:1"));
    work.vdisk(&format!("pull {host}/some/base:1 --to x {plain}")).fails(&["without --to"]);
    // A disk on an image's layers, in a store.
    work.vdisk("import oci:lay:b app --store s").succeeds();
    work.vdisk("clone app f.qcow2 --store s").succeeds();
    work.vdisk(&format!("push f.qcow2 {host}/vm/app:1 --as disk {plain}")).succeeds();
    work.vdisk(&format!("pull {host}/vm/app:1 --to away {plain}")).succeeds();
    same_files(&work, "away/f.qcow2", "lay:b");
}

/// Runs `vdisk` and kills it at the `when`th of some system calls of one of its threads; says whether it came to its end.
fn killed_at(work: &Work, when: usize, words: &str) -> bool {
    let calls = "fsync,fdatasync,linkat,rename,renameat2,unlink,unlinkat,ftruncate";
    let inject = format!("inject={calls}:signal=SIGKILL:when={when}");
    let front = ["-f", "-o", "/dev/null", "-e", &inject, crate::host::VDISK];
    let words = words.split_whitespace();
    work.run("strace", front.into_iter().chain(words)).code == Some(0)
}

#[test]
fn a_pull_and_a_prune_that_are_killed_are_done_again() {
    if !have(Need::Registry) {
        return;
    }
    let work = Work::new();
    layout(&work);
    let server = Server::open(&work);
    let host = &server.host;
    copy(&work, "oci:lay:b", &format!("docker://{host}/some/app:1"));
    work.vdisk("import oci:lay:b whole --store right").succeeds();
    let pull = |store: &str| format!("pull {host}/some/app:1 --tls-verify=false --store {store}");
    let mut whole = false;
    for when in 1..60 {
        let store = format!("s{when}");
        whole = killed_at(&work, when, &pull(&store));
        let images = work.vdisk(&format!("image list --store {store}")).succeeds().out();
        assert!(whole || images.is_empty() || images.contains("some/app"), "{images}");
        work.vdisk(&pull(&store)).succeeds();
        assert_eq!(layers(&work, &store), layers(&work, "right"), "killed at {when}");
        work.vdisk(&format!("image prune --yes --store {store}")).succeeds();
        assert_eq!(layers(&work, &store).len(), 2);
        // And the way back: what is left after a prune that was killed is whole, and goes.
        work.vdisk(&format!("clone {host}/some/app:1 d.qcow2 --store {store}")).succeeds();
        work.vdisk(&format!("image rm {host}/some/app:1 --store {store}")).succeeds();
        killed_at(&work, when, &format!("image prune --yes --store {store}"));
        work.vdisk("check d.qcow2 --chain").succeeds();
        work.vdisk("rm d.qcow2 --yes").succeeds();
        let pruned = killed_at(&work, when, &format!("image prune --yes --store {store}"));
        for (name, _) in layers(&work, &store) {
            work.qemu_img(&format!("check {store}/layers/{name}")).succeeds();
        }
        work.vdisk(&format!("image prune --yes --store {store}")).succeeds();
        assert_eq!(layers(&work, &store).len(), 0, "killed at {when}");
        fs::remove_dir_all(work.path(&store)).unwrap();
        if whole && pruned {
            assert!(when > 4);
            return;
        }
    }
    assert!(whole, "it never came to its end");
}
