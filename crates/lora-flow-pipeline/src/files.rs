//! Outside files: patterns of parameters → paths.

use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};
use lora_flow_core::nearest;

/// Deepest folder below one that a pipeline names; a loop of links ends here.
const MAX_DEPTH: usize = 64;

/// Why a pattern stands for nothing, and what to do about it.
pub(crate) type Refusal = (String, Option<String>);

/// The files that a pattern stands for, absolute and sorted: itself, all files below a folder, or
/// what a glob matches. Names that start with a dot are left out unless they are written out.
pub(crate) fn resolve(root: &Path, pattern: &str) -> Result<Vec<PathBuf>, Refusal> {
    if pattern.trim().is_empty() {
        return Err(("this path is empty".to_owned(), None));
    }
    if pattern.starts_with("~/") {
        let hint = "write the whole path, or `${{ env.HOME }}` with `env: [HOME]`".to_owned();
        return Err((format!("`~` has no meaning in `{pattern}`"), Some(hint)));
    }
    let path = root.join(pattern);
    let mut paths = if path.is_dir() {
        let mut files = Vec::new();
        below(&path, 0, &mut files)
            .map_err(|e| (format!("the folder `{pattern}` cannot be read: {e}"), None))?;
        if files.is_empty() {
            return Err((format!("the folder `{pattern}` holds no files"), None));
        }
        files
    } else if path.exists() {
        vec![path]
    } else if pattern.contains(['*', '?', '[']) {
        matches(root, pattern)?
    } else {
        return Err((format!("there is no file or folder `{pattern}`"), near(root, pattern)));
    };
    paths.sort();
    paths.dedup();
    Ok(paths)
}

fn below(dir: &Path, depth: usize, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if depth > MAX_DEPTH {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let path = entry.path();
        if path.is_dir() {
            below(&path, depth + 1, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn matches(root: &Path, pattern: &str) -> Result<Vec<PathBuf>, Refusal> {
    let options = MatchOptions {
        case_sensitive: true,
        require_literal_separator: true,
        require_literal_leading_dot: true,
    };
    let full = if Path::new(pattern).is_absolute() {
        pattern.to_owned()
    } else {
        format!("{}/{pattern}", Pattern::escape(&root.to_string_lossy()))
    };
    let found = glob::glob_with(&full, options)
        .map_err(|e| (format!("`{pattern}` is not a valid pattern: {}", e.msg), None))?;
    let files: Vec<PathBuf> = found.flatten().filter(|p| p.is_file()).collect();
    if files.is_empty() {
        let fixed: PathBuf = Path::new(pattern)
            .components()
            .take_while(|c| !c.as_os_str().to_string_lossy().contains(['*', '?', '[']))
            .collect();
        let shown = fixed.display().to_string();
        let hint = if shown.is_empty() {
            None
        } else if !root.join(&fixed).is_dir() {
            let near = near(root, pattern);
            Some(near.unwrap_or_else(|| format!("there is no folder `{shown}`")))
        } else {
            Some(format!("the folder `{shown}` exists, but nothing in it matches"))
        };
        return Err((format!("no file matches `{pattern}`"), hint));
    }
    Ok(files)
}

/// The first part of a path that does not exist, and the name beside it that was likely meant.
fn near(root: &Path, pattern: &str) -> Option<String> {
    let mut good = PathBuf::new();
    for part in Path::new(pattern).components() {
        let next = good.join(part);
        if root.join(&next).exists() {
            good = next;
            continue;
        }
        let wanted = part.as_os_str().to_string_lossy();
        let names: Vec<String> = std::fs::read_dir(root.join(&good))
            .ok()?
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        if let Some(name) = nearest(&wanted, names.iter().map(String::as_str)) {
            let rest = Path::new(pattern).strip_prefix(&next).unwrap_or(Path::new(""));
            let mut meant = good.join(name);
            if !rest.as_os_str().is_empty() {
                meant.push(rest);
            }
            return Some(format!("did you mean `{}`?", meant.display()));
        }
        if next != Path::new(pattern) {
            return Some(format!("there is no folder `{}`", next.display()));
        }
        return None;
    }
    None
}

/// A path without `.` and `..`, by its text alone.
pub(crate) fn normalise(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(root: &Path, pattern: &str) -> Result<Vec<String>, Refusal> {
        let paths = resolve(root, pattern)?;
        Ok(paths
            .iter()
            .map(|p| p.strip_prefix(root).unwrap().to_string_lossy().into_owned())
            .collect())
    }

    #[test]
    fn files_folders_and_globs_leave_dot_files_out() {
        // The folder's name holds glob characters, which must not act as such.
        let dir = tempfile::Builder::new().prefix("a[b]*").tempdir().unwrap();
        let root = dir.path();
        for name in ["data/b.csv", "data/a.csv", "data/.hidden", "data/sub/c.csv", "data/.d/e.csv"]
        {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        let all = ["data/a.csv", "data/b.csv", "data/sub/c.csv"].map(str::to_owned).to_vec();
        assert_eq!(names(root, "data"), Ok(all.clone()));
        assert_eq!(names(root, "data/**/*.csv"), Ok(all.clone()));
        assert_eq!(names(root, "data/*"), Ok(all[..2].to_vec()));
        assert_eq!(names(root, "data/.hidden"), Ok(vec!["data/.hidden".to_owned()]));
        let refusal = |pattern| names(root, pattern).unwrap_err();
        assert_eq!(
            refusal("dta/a.csv"),
            (
                "there is no file or folder `dta/a.csv`".into(),
                Some("did you mean `data/a.csv`?".into())
            )
        );
        assert_eq!(
            refusal("data/*.parquet"),
            (
                "no file matches `data/*.parquet`".into(),
                Some("the folder `data` exists, but nothing in it matches".into())
            )
        );
        assert!(refusal("data/[.csv").0.contains("not a valid pattern"));
        std::fs::create_dir(root.join("empty")).unwrap();
        assert_eq!(refusal("empty").0, "the folder `empty` holds no files");
    }

    #[test]
    fn normalise_is_lexical() {
        assert_eq!(normalise(Path::new("/a/./b/../c")), Path::new("/a/c"));
        assert_eq!(normalise(Path::new("/../a")), Path::new("/a"));
    }
}
