//! How long each kernel and product takes, by marks around them in the stream.

use std::collections::HashMap;
use std::sync::PoisonError;

use super::driver::Handle;
use super::gpu::{CudaError, Gpu, check};

type Result<T> = std::result::Result<T, CudaError>;

impl Gpu {
    /// Starts to note how long each kernel and product takes.
    pub fn start_profile(&self) {
        *self.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// What ran since [`Self::start_profile`]: name, launches and milliseconds, longest first. Waits.
    ///
    /// # Errors
    /// When the device failed.
    pub fn stop_profile(&self) -> Result<Vec<(String, usize, f64)>> {
        self.wait()?;
        let noted = self.profile.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut sums: HashMap<String, (usize, f64)> = HashMap::new();
        for (name, start, end) in noted.unwrap_or_default() {
            let mut ms = 0.0;
            // Safety: both events are ours and were reached.
            unsafe {
                check(self.driver, (self.driver.event_elapsed)(&mut ms, start, end), "time")?;
                (self.driver.event_destroy)(start);
                (self.driver.event_destroy)(end);
            }
            let sum = sums.entry(name).or_default();
            (sum.0, sum.1) = (sum.0 + 1, sum.1 + f64::from(ms));
        }
        let mut all: Vec<_> = sums.into_iter().map(|(name, (n, ms))| (name, n, ms)).collect();
        all.sort_by(|a, b| b.2.total_cmp(&a.2));
        Ok(all)
    }

    /// Queues work, with marks around it while a profile is taken.
    pub(crate) fn noted(
        &self,
        name: impl FnOnce() -> String,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut profile = self.profile.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(notes) = &mut *profile else {
            drop(profile);
            return work();
        };
        let mark = || -> Result<Handle> {
            let mut event = std::ptr::null_mut();
            // Safety: valid pointers.
            unsafe {
                check(self.driver, (self.driver.event_create)(&mut event, 0), "mark")?;
                check(self.driver, (self.driver.event_record)(event, self.stream), "mark")?;
            }
            Ok(event)
        };
        let start = mark()?;
        work()?;
        notes.push((name(), start, mark()?));
        Ok(())
    }
}
