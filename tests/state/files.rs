//! Saving to a file: it is whole in its place or not there, whatever else is at the path.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Barrier;

use loris::{Error, NewFile, Session, SessionOptions};
use tempfile::TempDir;

use crate::support::{checkpoint, open, options};
use crate::{prompt, save};

/// A session of `n` tokens, its blob, and a folder with nothing in it.
fn saved(n: usize) -> (Session, Vec<u8>, TempDir) {
    let model = open(checkpoint("llama-tied"), &options(256));
    let mut session = model.session(&SessionOptions::default()).unwrap();
    session.prefill(&prompt(1, n)).unwrap();
    let blob = save(&session);
    (session, blob, TempDir::new().unwrap())
}

/// What is in a folder, by name.
fn names(folder: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> =
        folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into()).collect();
    names.sort();
    names
}

fn reason(saved: Result<(), Error>) -> String {
    match saved {
        Err(Error::Io { path, source }) => format!("{path}: {source}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn of_ten_who_save_to_one_path_one_is_there_whole() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("state");
    let model = open(checkpoint("llama-tied"), &options(2_048));
    let start = Barrier::new(10);
    let saver = |i: usize| {
        let mut session = model.session(&SessionOptions::default()).unwrap();
        session.prefill(&prompt(i, 40 + 20 * i)).unwrap();
        session
    };
    let sessions: Vec<Session> = (0..10).map(saver).collect();
    let blobs: Vec<Vec<u8>> = sessions.iter().map(save).collect();
    std::thread::scope(|scope| {
        for session in &sessions {
            scope.spawn(|| {
                start.wait();
                for _ in 0..10 {
                    session.save_file(&path).unwrap();
                    let seen = fs::read(&path).unwrap();
                    assert!(blobs.contains(&seen), "{} bytes are of none", seen.len());
                }
            });
        }
    });
    assert!(blobs.contains(&fs::read(&path).unwrap()));
    assert_eq!(names(folder.path()), [Path::new("state")]);
    assert!(model.restore_file(&path, &SessionOptions::default()).is_ok());
}

#[test]
fn what_is_saved_is_its_owners_alone_and_follows_no_planted_link() {
    let (session, blob, folder) = saved(20);
    let (path, other) = (folder.path().join("state"), folder.path().join("other"));
    fs::write(&other, "somebody else's").unwrap();
    symlink(&other, folder.path().join("state.part")).unwrap();
    for old in ["", "an old file that anybody may read"] {
        if !old.is_empty() {
            fs::write(&path, old).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        }
        session.save_file(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), blob);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    }
    assert_eq!(fs::read(&other).unwrap(), b"somebody else's");
    assert_eq!(names(folder.path()), ["other", "state", "state.part"].map(PathBuf::from));
}

#[test]
fn a_link_stays_and_what_it_leads_to_is_replaced() {
    let (session, blob, folder) = saved(20);
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("far")).unwrap();
    fs::write(at("far/state"), "old").unwrap();
    symlink("far/state", at("near")).unwrap();
    symlink("near", at("link")).unwrap();
    session.save_file(&at("link")).unwrap();
    assert_eq!(fs::read(at("far/state")).unwrap(), blob);
    assert!(at("link").symlink_metadata().unwrap().is_symlink());
    assert!(at("near").symlink_metadata().unwrap().is_symlink());
    assert_eq!(names(&at("far")), [Path::new("state")]);
}

#[test]
fn what_is_no_regular_file_is_refused_by_name_and_stays() {
    let (session, _, folder) = saved(20);
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("folder")).unwrap();
    let _socket = UnixListener::bind(at("socket")).unwrap();
    let mkfifo = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
    assert!(mkfifo.success());
    symlink("/dev/null", at("device")).unwrap();
    symlink("pipe", at("to-pipe")).unwrap();
    symlink("nowhere", at("to-nowhere")).unwrap();
    let before = names(folder.path());
    for (name, what) in [
        ("folder", "is a folder"),
        ("socket", "is a device, a pipe or a socket"),
        ("pipe", "is a device, a pipe or a socket"),
        ("device", "is a device, a pipe or a socket"),
        ("to-pipe", "is a device, a pipe or a socket"),
        ("to-nowhere", "is a symbolic link that leads nowhere"),
        ("new/", "is no name of a file"),
        ("folder/..", "is no name of a file"),
        ("nowhere/state", "No such file or directory"),
    ] {
        let reason = reason(session.save_file(&at(name)));
        let path = at(name).display().to_string();
        assert!(reason.starts_with(&path) && reason.contains(what), "{reason}");
        assert!(!reason.contains(".part"), "{reason}");
    }
    assert!(reason(session.save_file(Path::new(""))).contains("is no name of a file"));
    assert_eq!(names(folder.path()), before);
    assert!(at("pipe").symlink_metadata().unwrap().file_type().is_fifo());
    assert!(Path::new("/dev/null").metadata().unwrap().file_type().is_char_device());
}

#[test]
fn a_save_that_fails_leaves_the_old_file_and_nothing_else() {
    let (mut session, blob, folder) = saved(20);
    let path = folder.path().join("state");
    session.save_file(&path).unwrap();
    session.push(5).unwrap();
    assert!(matches!(session.save_file(&path), Err(Error::State { .. })));
    // As when the disk is full half way.
    let mut file = NewFile::create(&path).unwrap();
    file.write_all(b"half of").unwrap();
    assert_eq!(names(folder.path()).len(), 2);
    drop(file);
    // As when somebody made a folder of the path meanwhile.
    let elsewhere = folder.path().join("elsewhere");
    let file = NewFile::create(&elsewhere).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    assert!(file.commit().is_err());
    fs::remove_dir(&elsewhere).unwrap();

    assert_eq!(fs::read(&path).unwrap(), blob);
    assert_eq!(names(folder.path()), [Path::new("state")]);
}

/// Whoever writes lines into a file as they come has it in its place from the start.
#[test]
fn a_file_that_is_in_its_place_can_grow() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("lines");
    fs::write(&path, "old").unwrap();
    let mut file: File = NewFile::create(&path).unwrap().commit().unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"");
    file.write_all(b"a line\n").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"a line\n");
}
