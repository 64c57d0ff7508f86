// SPDX-License-Identifier: GPL-2.0

//! `/dev/exitmeter`: a snapshot of all ledgers, by `read`.

use kernel::{
    fs::{
        File,
        Kiocb, //
    },
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
    hooks,
    meter::{
        ledger::Totals,
        snapshot::Full, //
    },
};

/// An open file: the snapshot that it reads from. A read at offset 0 takes a fresh one, any
/// other goes on in the same.
#[pin_data]
pub(crate) struct Device {
    #[pin]
    snapshot: Mutex<KVVec<u8>>,
}

#[vtable]
impl MiscDevice for Device {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _device: &MiscDeviceRegistration<Self>) -> Result<Self::Ptr> {
        KBox::try_pin_init(
            try_pin_init!(Self {
                snapshot <- new_mutex!(KVVec::new(), "exitmeter::snapshot"),
            }),
            GFP_KERNEL,
        )
    }

    fn read_iter(mut kiocb: Kiocb<'_, Self::Ptr>, iov: &mut IovIterDest<'_>) -> Result<usize> {
        let device = kiocb.file();
        let mut snapshot = device.snapshot.lock();
        if *kiocb.ki_pos_mut() == 0 {
            *snapshot = take()?;
        }
        iov.simple_read_from_buffer(kiocb.ki_pos_mut(), &snapshot)
    }
}

/// A snapshot of now.
fn take() -> Result<KVVec<u8>> {
    let registry = hooks::registry().ok_or(ENODEV)?;
    // One that turns out too large leaves word of how large it is.
    loop {
        let mut buffer = KVVec::from_elem(0, registry.likely_size(), GFP_KERNEL_ACCOUNT)?;
        let mut gone = KVBox::<Totals>::zeroed(GFP_KERNEL_ACCOUNT)?;
        match registry.snapshot(&mut buffer, &mut gone) {
            Ok(written) => {
                buffer.truncate(written);
                return Ok(buffer);
            }
            Err(Full { .. }) if kernel::current!().signal_pending() => return Err(ERESTARTSYS),
            Err(Full { .. }) => {}
        }
    }
}
