use super::*;
use std::time::Duration;

#[test]
fn a_store_is_made_once_and_knows_its_format() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/store");
    Store::open(&path).unwrap();
    assert_eq!(fs::read_to_string(path.join("format")).unwrap(), "1\n");
    assert_eq!(fs::read_to_string(path.join(".gitignore")).unwrap(), "*\n");
    Store::open(&path).unwrap();
    // Its making was interrupted.
    fs::remove_file(path.join("format")).unwrap();
    Store::open(&path).unwrap();
}

#[test]
fn newer_and_foreign_folders_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    fs::write(store.dir().join("format"), "2\n").unwrap();
    let error = Store::open(store.dir()).unwrap_err();
    assert!(error.to_string().contains("has format 2; this version of lora-flow knows format 1"));
    assert!(error.hint().unwrap().contains("update lora-flow"));
    fs::write(store.dir().join("format"), "banana").unwrap();
    assert!(Store::open(store.dir()).unwrap_err().to_string().contains("is damaged"));

    fs::write(dir.path().join("thesis.txt"), "").unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    assert!(error.to_string().contains("is not an artifact store: it holds"), "{error}");
    fs::write(dir.path().join("file"), "").unwrap();
    assert!(Store::open(&dir.path().join("file")).is_err());
}

#[test]
fn file_names_are_readable_safe_and_distinct() {
    assert_eq!(file_name_of("train[r=8]"), "train[r=8]");
    for odd in ["a/b", "a b", "../x", ".", "", "é", &"x".repeat(300)] {
        let name = file_name_of(odd);
        assert!(!name.starts_with('.') && !name.contains('/') && name.len() < 100, "{odd}: {name}");
        assert_ne!(name, odd);
    }
    assert_ne!(file_name_of("a/b"), file_name_of("a_b"));
    assert_ne!(file_name_of("a/b"), file_name_of("a b"));
}

#[test]
fn a_large_file_hashes_as_a_small_one_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let part = 32 << 10;
    let around = [part - 1, part, part + 1, part + 1024, 2 * part, 3 * part + 1, 8 * part + 7];
    for size in [0, 1, 1000, (17 << 20) + 5].into_iter().chain(around) {
        let bytes: Vec<u8> = (0..size).map(|i| (i * 7 % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        assert_eq!(hash_file(&path).unwrap(), Digest::of_bytes(&bytes), "{size}");
    }
    assert!(hash_file(&dir.path().join("missing")).unwrap_err().chain().contains("missing"));
}

#[test]
fn a_lock_excludes_and_its_file_may_go() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("locks/x.lock");
    let lock = FileLock::try_exclusive(&path).unwrap().unwrap();
    assert!(FileLock::try_exclusive(&path).unwrap().is_none());
    let cancel = CancelToken::default();
    cancel.cancel();
    let error = FileLock::exclusive(&path, &cancel, || {}).unwrap_err();
    assert_eq!(error.kind(), lora_flow_core::ErrorKind::Cancelled);
    lock.remove();
    assert!(!path.exists());
    drop(FileLock::try_exclusive(&path).unwrap().unwrap());
}

#[test]
fn locks_of_many_threads_never_overlap_though_their_file_comes_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.lock");
    let inside = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for i in 0..40 {
                    let lock = FileLock::exclusive(&path, &CancelToken::default(), || {}).unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    if i % 8 == 0 {
                        std::thread::sleep(Duration::from_micros(200));
                    }
                    inside.fetch_sub(1, Ordering::SeqCst);
                    if i % 2 == 0 { lock.remove() } else { drop(lock) }
                }
            });
        }
    });
}

#[test]
fn the_state_folder_leads_back_to_its_store() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let state = store.state_dir(&Digest::of_bytes(b"key"));
    assert_eq!(Store::of_state_dir(&state).unwrap().dir(), store.dir());
    assert!(Store::of_state_dir(Path::new("/somewhere/else")).is_none());
}
