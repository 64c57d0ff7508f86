/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Input of bindgen for the module: the types of KVM and ftrace that src/kvm and
 * src/hooks read, the functions of the shim, and the layout of those types by
 * the C compiler (layout.h, made from bindings/layout.c), so that Rust can
 * assert that both compilers agree.
 */
#include <linux/kvm_host.h>
#include <linux/ftrace.h>
#include <linux/miscdevice.h>

#include "../src/shim.h"
#include "layout.h"
