/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What bindgen reads for the module: the types of KVM and ftrace that src/kvm
 * and src/hooks look into, the functions of the shim, and the layout of those
 * types as the C compiler sees it (layout.h, made from bindings/layout.c), so
 * that Rust can assert that both compilers agree.
 */
#include <linux/kvm_host.h>
#include <linux/ftrace.h>
#include <linux/miscdevice.h>

#include "../src/shim.h"
#include "layout.h"
