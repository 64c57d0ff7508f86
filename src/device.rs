// SPDX-License-Identifier: GPL-2.0

//! `/dev/exitmeter`: a snapshot of all ledgers, by `read`, and details while an open file asks for them.

use kernel::{
    fs::{
        File,
        Kiocb, //
    },
    ioctl::_IO,
    iov::IovIterDest,
    miscdevice::{
        MiscDevice,
        MiscDeviceRegistration, //
    },
    new_mutex,
    prelude::*,
    sync::Mutex,
};

use crate::{
    linux::{
        node::Node,
        task, //
    },
    meter::{
        ledger::Totals,
        registry::walk::{
            NoSnapshot,
            TableOptions, //
        },
    },
    registry::published, //
};

/// Create the node. Root can read it, and the group that udev gives it.
pub(crate) fn node() -> impl PinInit<Node, Error> {
    Node::register::<Device>(c"exitmeter", 0o440)
}

/// An open file.
#[pin_data]
struct Device {
    /// Snapshot that reads return. A read at offset 0 takes a fresh one.
    #[pin]
    snapshot: Mutex<KVVec<u8>>,
    /// True if the task that opened the file may see details and the guest's code.
    may_see_details: bool,
    #[pin]
    details: Mutex<Option<DetailsRequest>>,
}

/// Ioctl that turns details on for as long as the file is open: `_IO(0xE7, 1)`. Needs CAP_PERFMON, else
/// `EPERM`.
const TURN_ON_DETAILS: u32 = _IO(0xe7, 1);

/// Ioctl that thaws the rings of the latest exits: `_IO(0xE7, 2)`. Needs a file that has turned details on,
/// else `EPERM`.
const THAW_RINGS: u32 = _IO(0xe7, 2);

/// Request for details, which are on while it lives.
pub(crate) struct DetailsRequest(());

impl DetailsRequest {
    /// Turn details on, unless they are on. The registry must be published for as long as this lives.
    pub(crate) fn new() -> Result<Self> {
        published().ok_or(ENODEV)?.hold_details();
        Ok(Self(()))
    }
}

impl Drop for DetailsRequest {
    fn drop(&mut self) {
        if let Some(registry) = published() {
            registry.release_details();
        }
    }
}

#[vtable]
impl MiscDevice for Device {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _device: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        KBox::try_pin_init(
            try_pin_init!(Self {
                snapshot <- new_mutex!(KVVec::new(), "exitmeter::snapshot"),
                may_see_details: task::may_see_details(),
                details <- new_mutex!(None, "exitmeter::details"),
            }),
            GFP_KERNEL,
        )
    }

    fn ioctl(device: Pin<&Self>, _file: &File, cmd: u32, _arg: usize) -> Result<isize> {
        if cmd == THAW_RINGS {
            if device.details.lock().is_none() {
                return Err(EPERM);
            }
            published().ok_or(ENODEV)?.thaw_rings();
            return Ok(0);
        }
        if cmd != TURN_ON_DETAILS {
            return Err(ENOTTY);
        }
        if !task::may_see_details() {
            return Err(EPERM);
        }
        let mut details = device.details.lock();
        if details.is_none() {
            *details = Some(DetailsRequest::new()?);
        }
        Ok(0)
    }

    fn read_iter(mut kiocb: Kiocb<'_, Self::Ptr>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        let device = kiocb.file();
        let mut snapshot = device.snapshot.lock();
        if *kiocb.ki_pos_mut() == 0 {
            let code = device.may_see_details || device.details.lock().is_some();
            *snapshot = take(TableOptions { code })?;
        }
        iov.simple_read_from_buffer(kiocb.ki_pos_mut(), &snapshot)
    }
}

/// Take a snapshot.
///
/// # Errors
///
/// Fails with `EAGAIN` if a vCPU could not be copied, not even by 16 interrupts in a row, and with
/// `ERESTARTSYS` on a signal.
fn take(options: TableOptions) -> Result<KVVec<u8>> {
    let registry = published().ok_or(ENODEV)?;
    // A snapshot that does not fit raises the estimate for the next attempt.
    loop {
        let mut buffer = KVVec::from_elem(0, registry.estimated_size(), GFP_KERNEL_ACCOUNT)?;
        let mut gone = KVBox::<Totals>::zeroed(GFP_KERNEL_ACCOUNT)?;
        match registry.snapshot(&mut buffer, &mut gone, options) {
            Ok(written) => {
                buffer.truncate(written);
                return Ok(buffer);
            }
            Err(NoSnapshot::CopyFailed) => return Err(EAGAIN),
            Err(NoSnapshot::BufferTooSmall(_)) if kernel::current!().signal_pending() => {
                return Err(ERESTARTSYS)
            }
            Err(NoSnapshot::BufferTooSmall(_)) => {}
        }
    }
}
