//! Where each layer's gate and up stand between forward and backward when the device has no room
//! for all of them: on the device, in memory of the host, to which they are copied while the next
//! layers compute, or nowhere, to be computed again.

use std::collections::VecDeque;

use lora_flow_kernels::cuda::{Buffer, Copier, CudaError, DevicePtr, HostBuffer};

type Result<T> = std::result::Result<T, CudaError>;

/// What becomes of a layer's gate and up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// They stay on the device.
    Here,
    /// They go to the host and come back.
    Away,
    /// They are computed again.
    Again,
}

/// Milliseconds of a layer's forward, of the copy of its gate and up, and of computing them again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    pub(super) forward: f64,
    pub(super) copy: f64,
    pub(super) again: f64,
}

/// For `layers` layers and `buffers` buffers on the device (at least one): the last layers stay, and
/// of those before as many go away as the copies can follow. At most `host` go away.
pub(super) fn plan(layers: usize, buffers: usize, host: usize, speed: Option<Speed>) -> Vec<Keep> {
    let stay = |here: usize| {
        (0..layers).map(|l| if l + here < layers { Keep::Again } else { Keep::Here }).collect()
    };
    let mut best: Vec<Keep> = stay(buffers.min(layers));
    let Some(speed) = speed else { return best };
    for here in (0..=buffers.min(layers)).rev() {
        let mut plan: Vec<Keep> = stay(here);
        let mut away = 0;
        for l in 0..layers - here {
            let before = cost(&plan, buffers, speed);
            plan[l] = Keep::Away;
            if away == host || cost(&plan, buffers, speed) >= before {
                plan[l] = Keep::Again;
            } else {
                away += 1;
            }
        }
        if cost(&plan, buffers, speed) < cost(&best, buffers, speed) {
            best = plan;
        }
    }
    best
}

/// What a plan costs above keeping all: layers that are computed again, and waiting for a buffer
/// whose copy is still under way.
fn cost(plan: &[Keep], buffers: usize, speed: Speed) -> f64 {
    let (mut now, mut again, mut copied, mut here) = (0.0f64, 0.0, 0.0f64, 0);
    let mut copies: VecDeque<f64> = VecDeque::new();
    for keep in plan {
        while copies.front().is_some_and(|end| *end <= now) {
            copies.pop_front();
        }
        if copies.len() + here >= buffers {
            match copies.pop_front() {
                Some(end) => now = end,
                None => return f64::INFINITY,
            }
        }
        now += speed.forward;
        match keep {
            Keep::Here => here += 1,
            Keep::Away => {
                copied = copied.max(now) + speed.copy;
                copies.push_back(copied);
            }
            Keep::Again => again += speed.again,
        }
    }
    now - speed.forward * plan.len() as f64 + again
}

/// Which buffer each layer uses, forward and backward.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Slots {
    pub(super) forward: Vec<usize>,
    pub(super) backward: Vec<usize>,
    /// By layer: the layers that take their buffers when this one is done backward, those that go
    /// first first; after the last, those that find buffers when the backward begins.
    pub(super) next: Vec<Vec<usize>>,
}

/// Hands out the buffers: in turns, so that the one whose copy began first is used again first.
pub(super) fn slots(plan: &[Keep], buffers: usize) -> Slots {
    let layers = plan.len();
    let mut free: VecDeque<usize> = (0..buffers).collect();
    let mut slots = Slots {
        forward: vec![0; layers],
        backward: vec![0; layers],
        next: vec![Vec::new(); layers + 1],
    };
    for (l, keep) in plan.iter().enumerate() {
        let slot = free.pop_front().unwrap_or(0);
        slots.forward[l] = slot;
        match keep {
            Keep::Here => {}
            Keep::Away => free.push_back(slot),
            Keep::Again => free.push_front(slot),
        }
    }
    slots.backward.clone_from(&slots.forward);
    let mut waiting: VecDeque<usize> =
        (0..layers).rev().filter(|l| plan[*l] != Keep::Here).collect();
    for done in (0..=layers).rev() {
        if done < layers {
            free.push_back(slots.backward[done]);
        }
        while let (Some(layer), true) = (waiting.front().copied(), !free.is_empty()) {
            waiting.pop_front();
            slots.backward[layer] = free.pop_front().unwrap_or(0);
            slots.next[done].push(layer);
        }
    }
    slots
}

fn whole(buffer: &Buffer<u8>) -> (DevicePtr, usize) {
    (buffer.ptr(), buffer.len())
}

/// Gate and up of all layers, and the way they go.
pub(super) struct GateUp {
    /// First, so that it waits for its copies before their memory goes.
    copier: Option<Copier>,
    host: Vec<Option<HostBuffer>>,
    buffers: Vec<Buffer<u8>>,
    /// The first layer with a backward.
    lowest: usize,
    plan: Vec<Keep>,
    slots: Slots,
}

impl GateUp {
    /// One buffer for `layers` layers that leave nothing.
    pub(super) fn one(buffer: Buffer<u8>, layers: usize) -> Self {
        Self::new(vec![buffer], 0, vec![Keep::Again; layers], None, Vec::new())
    }

    /// The layers from `lowest` on follow a plan; `host` has memory for each that goes away.
    pub(super) fn new(
        buffers: Vec<Buffer<u8>>,
        lowest: usize,
        mut plan: Vec<Keep>,
        copier: Option<Copier>,
        mut host: Vec<Option<HostBuffer>>,
    ) -> Self {
        plan.splice(0..0, vec![Keep::Again; lowest]);
        host.splice(0..0, (0..lowest).map(|_| None));
        let slots = slots(&plan, buffers.len());
        Self { copier, host, buffers, lowest, plan, slots }
    }

    /// The buffer of [`Self::one`], to be placed anew.
    pub(super) fn take_one(&mut self) -> Option<Buffer<u8>> {
        self.buffers.pop()
    }

    /// Layers whose gate and up stay, go away, and are computed again.
    pub(super) fn counts(&self) -> [usize; 3] {
        [Keep::Here, Keep::Away, Keep::Again]
            .map(|keep| self.plan[self.lowest..].iter().filter(|k| **k == keep).count())
    }

    /// Whether a layer computes them again in the backward.
    pub(super) fn again(&self, layer: usize) -> bool {
        self.plan[layer] == Keep::Again
    }

    /// Where they are.
    pub(super) fn at(&self, layer: usize, backward: bool) -> &Buffer<u8> {
        let slots = if backward { &self.slots.backward } else { &self.slots.forward };
        &self.buffers[slots[layer]]
    }

    /// Before a layer's forward writes them: waits for the copy from its buffer that came before.
    pub(super) fn enter(&self, layer: usize) -> Result<()> {
        let Some(copier) = &self.copier else { return Ok(()) };
        let slot = self.slots.forward[layer];
        let before = (0..layer).rev().find(|l| self.slots.forward[*l] == slot);
        match before {
            Some(l) if self.plan[l] == Keep::Away => copier.after_copy(l),
            _ => Ok(()),
        }
    }

    /// After a layer's forward: sends them away.
    pub(super) fn leave(&self, layer: usize) -> Result<()> {
        let Some(copier) = &self.copier else { return Ok(()) };
        let Some(host) = &self.host[layer] else { return Ok(()) };
        copier.worked(layer)?;
        copier.after_work(layer)?;
        copier.send(layer, host, &[whole(self.at(layer, false))])
    }

    /// Before a layer's backward: waits for them, or for the copies that its buffer was in.
    pub(super) fn enter_backward(&self, layer: usize) -> Result<()> {
        let Some(copier) = &self.copier else { return Ok(()) };
        match self.plan[layer] {
            Keep::Here => Ok(()),
            Keep::Away => copier.after_copy(layer),
            // Its buffer may have been sent in the forward.
            Keep::Again => copier.after_copy(self.plan.len()),
        }
    }

    /// After a layer's backward, or with the number of layers when it begins: fetches what goes into
    /// the buffers that are free now.
    pub(super) fn leave_backward(&self, layer: usize) -> Result<()> {
        let Some(copier) = &self.copier else { return Ok(()) };
        if layer == self.plan.len() {
            copier.copied(layer)?;
        }
        let mut marked = false;
        for next in &self.slots.next[layer] {
            let Some(host) = &self.host[*next] else { continue };
            if !marked {
                copier.worked(layer)?;
                copier.after_work(layer)?;
                marked = true;
            }
            copier.fetch(*next, &[whole(self.at(*next, true))], host)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEED: Speed = Speed { forward: 6.0, copy: 9.0, again: 2.7 };

    fn count(plan: &[Keep], keep: Keep) -> usize {
        plan.iter().filter(|k| **k == keep).count()
    }

    #[test]
    fn with_room_all_stay_and_without_copies_the_last() {
        assert_eq!(count(&plan(32, 32, 0, None), Keep::Here), 32);
        assert_eq!(plan(32, 32, 32, Some(SPEED)), plan(32, 40, 0, None));
        let some = plan(32, 10, 32, None);
        assert_eq!(count(&some, Keep::Here), 10);
        assert!(some[22..].iter().all(|k| *k == Keep::Here));
    }

    #[test]
    fn copies_spare_what_they_can_follow() {
        let many = plan(32, 10, 32, Some(SPEED));
        assert!(count(&many, Keep::Again) <= 3, "{many:?}");
        assert!(cost(&many, 10, SPEED) < 3.0 * SPEED.again);
        let few = plan(32, 10, 4, Some(SPEED));
        assert_eq!(count(&few, Keep::Away), 4);
        let slow = Speed { copy: 600.0, ..SPEED };
        assert_eq!(plan(32, 10, 32, Some(slow)), plan(32, 10, 0, None));
    }

    /// Every layer finds what it wrote: runs a plan with the content of the buffers in mind.
    #[test]
    fn buffers_hold_what_layers_need() {
        for (layers, buffers, host) in
            [(32, 10, 32), (32, 2, 32), (5, 1, 5), (16, 12, 3), (7, 7, 0)]
        {
            for copy in [0.5, 4.0, 9.0, 30.0] {
                let plan = plan(layers, buffers, host, Some(Speed { copy, ..SPEED }));
                let slots = slots(&plan, buffers);
                let mut held = vec![None; buffers];
                let mut sent = vec![false; layers];
                for l in 0..layers {
                    let slot = slots.forward[l];
                    if let Some(before) = held[slot] {
                        assert_ne!(plan[before], Keep::Here, "layer {before} stays");
                    }
                    held[slot] = Some(l);
                    sent[l] = plan[l] == Keep::Away;
                }
                let mut busy: Vec<Option<usize>> =
                    held.iter().map(|h| h.filter(|l| plan[*l] == Keep::Here)).collect();
                for done in (0..=layers).rev() {
                    if done < layers {
                        let slot = slots.backward[done];
                        assert_eq!(busy[slot], Some(done), "{plan:?}");
                        assert!(plan[done] != Keep::Away || sent[done]);
                        busy[slot] = None;
                    }
                    for next in &slots.next[done] {
                        assert_eq!(busy[slots.backward[*next]], None);
                        busy[slots.backward[*next]] = Some(*next);
                    }
                }
            }
        }
    }
}
