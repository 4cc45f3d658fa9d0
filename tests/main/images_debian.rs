//! A real image: Debian's minbase, python3 on top of it, an application on top of that. Made by umoci from Debian's
//! packages, imported and run by a user who is not root, and judged by umoci, the kernel's ext4 and e2fsck.

use crate::container::able;
use crate::host::{Done, Work};
use crate::images::{LONG, digests, same_files};
use crate::require::{Need, have, lacks};
use crate::someone::{Ids, Who, give, start};

const LENT: Who = Who::Someone(Ids::Lent);
/// minbase in the bundle's root, and beside it the packages of python3 that are to come on top. Without what is only
/// read by people.
const PACKAGES: &str = r#"
umoci init --layout lay
umoci new --image lay:base
umoci unpack --image lay:base bundle
mkdir packages
install='apt-get clean; apt-get -qq -o APT::Sandbox::User=root --no-install-recommends --download-only install python3'
. /etc/os-release
mmdebstrap --quiet --variant=minbase --skip=check/empty --dpkgopt=force-unsafe-io --aptopt='Acquire::Retries "3"' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook="chroot \"\$1\" sh -ec '$install'" --customize-hook='cp "$1"/var/cache/apt/archives/*.deb packages/' \
  "${VERSION_CODENAME:-stable}" bundle/rootfs
"#;

/// A layer of each: the base, python3, the application; and another application on the same two.
const LAYERS: &str = r#"
umoci repack --refresh-bundle --image lay:base bundle
mkdir bundle/rootfs/packages
cp packages/*.deb bundle/rootfs/packages
install='apt-get -qq --no-install-recommends -o Dpkg::Options::=--force-unsafe-io install /packages/*.deb'
DEBIAN_FRONTEND=noninteractive chroot bundle/rootfs sh -ec "$install" >installed 2>&1 || { cat installed >&2; exit 1; }
rm -r bundle/rootfs/packages
umoci repack --refresh-bundle --image lay:python bundle
echo other >bundle/rootfs/srv/other
umoci repack --image lay:other bundle
rm -r packages bundle/rootfs/srv/other
cd bundle/rootfs
mkdir -p srv/app/data
cp "$1/app.py" srv/app/
chmod 755 srv/app/app.py
chown -R 1000:1000 srv/app/data
setfattr -n user.made.by -v umoci srv/app/app.py
# cap_net_bind_service, permitted and effective.
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 srv/app/app.py
rm usr/share/python3/debpython/version.py
rm -r etc/cron.daily
echo x >etc/cron.daily
echo 'the application' >etc/motd
cd ../..
umoci repack --image lay:app bundle
umoci config --image lay:app --config.entrypoint /usr/bin/python3 --config.entrypoint /srv/app/app.py \
  --config.env GREETING=hello --config.workingdir /srv/app/data --config.user 1000:1000
rm -r bundle
chmod -R a+rX lay
"#;

const PROGRAM: &str = r#"#!/usr/bin/python3
import hashlib, json, os, sqlite3, sys
db = sqlite3.connect("app.db")
db.execute("create table if not exists turns (n integer)")
db.execute("insert into turns values (1)")
db.commit()
turns = db.execute("select count(*) from turns").fetchone()[0]
print(json.dumps([os.environ["GREETING"], os.getuid(), os.getcwd(), turns, sys.argv[1:],
                  hashlib.sha256(open("/etc/motd", "rb").read()).hexdigest()[:8]]))
"#;

/// The layout, or nothing where Debian's packages cannot be had.
fn made(work: &Work) -> bool {
    let sh = |script: &str| {
        let place = work.dir().to_str().unwrap();
        work.command("sh", ["-ec", script, "sh", place]).finish(None, LONG)
    };
    let packages = sh(PACKAGES);
    if packages.code != Some(0) {
        let said = packages.err();
        return lacks(Need::Debian, said.lines().last().unwrap_or("mmdebstrap fails"));
    }
    work.put("app.py", PROGRAM);
    sh(LAYERS).succeeds();
    true
}

fn as_user(work: &Work, words: &str) -> Done {
    start(work, LENT, words.split_whitespace()).finish(None, LONG)
}

/// Requires that the file system in a disk is sound.
fn sound(work: &Work, disk: &str) {
    work.command(
        "sh",
        [
            "-ec",
            &format!(
                "qemu-img convert -O raw {disk} whole.raw; e2fsck -fn whole.raw; rm whole.raw"
            ),
        ],
    )
    .finish(None, LONG)
    .succeeds();
}

/// The layers in the store, but for their first cluster, whose label says who stands on them.
fn bodies(work: &Work) -> Vec<String> {
    let script = "cd s/layers; for f in *; do echo $f $(tail -c +65537 $f | sha256sum); done";
    let done = work.command("sh", ["-ec", script]).finish(None, LONG).succeeds();
    done.out().lines().map(str::to_owned).collect()
}

#[test]
fn an_image_of_debian_s_packages_is_imported_run_and_exported_by_an_ordinary_user() {
    if !have(Need::Oci) || !have(Need::Debian) || !able() || !have(Need::Uidmap) {
        return;
    }
    let work = Work::new();
    if !made(&work) {
        return;
    }
    give(&work);
    as_user(&work, "import oci:lay:app app --store s").succeeds();
    let first = bodies(&work);
    assert_eq!(first.len(), 3);
    // Another on the same two layers costs its own.
    as_user(&work, "import oci:lay:other other --store s").succeeds();
    let all = bodies(&work);
    assert_eq!(all.len(), 4);
    assert!(first.iter().all(|layer| all.contains(layer)), "what was there has changed");

    as_user(&work, "clone --store s other e.qcow2").succeeds();
    assert_eq!(as_user(&work, "cat e.qcow2:/srv/other").succeeds().out(), "other\n");
    as_user(&work, "cat e.qcow2:/srv/app/app.py").fails(&[]);
    as_user(&work, "clone --store s app d.qcow2").succeeds();
    same_files(&work, "d.qcow2", "lay:app");

    // Root's and the user's containers run it alike; what the clone had written stays in it.
    let says = |turns: u32, words: &str| {
        format!("[\"hello\", 1000, \"/srv/app/data\", {turns}, [{words}], \"18f609b6\"]\n")
    };
    let run = as_user(&work, "run --store s app one two").succeeds();
    assert_eq!(run.out(), says(1, "\"one\", \"two\""));
    for turns in 1..=2 {
        assert_eq!(as_user(&work, "run d.qcow2").succeeds().out(), says(turns, ""));
    }

    // What was not changed leaves as it came; what was is one layer more.
    as_user(&work, "clone --store s app same.qcow2").succeeds();
    as_user(&work, "export same.qcow2 oci:out:same --store s").succeeds();
    assert_eq!(digests(&work, "out", "same"), digests(&work, "lay", "app"));
    as_user(&work, "export d.qcow2 oci:out:more --store s").succeeds();
    let more = digests(&work, "out", "more");
    assert_eq!((&more[..3], more.len()), (&digests(&work, "lay", "app")[..], 4));
    sound(&work, "d.qcow2");
    // umoci's unpacked files run as a root directory of their own: the same program, the third time.
    let script = "umoci unpack --image out:more theirs; cd $1/theirs/rootfs; \
        chroot --userspec=1000:1000 . sh -c 'cd /srv/app/data; GREETING=hello python3 /srv/app/app.py'";
    let again = work.command("sh", ["-ec", script, "sh", work.dir().to_str().unwrap()]);
    assert!(again.finish(None, LONG).succeeds().out().ends_with(&says(3, "")));
}
