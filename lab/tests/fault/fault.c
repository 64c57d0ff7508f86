// SPDX-License-Identifier: GPL-2.0
/*
 * Does the wrong that its parameter names, as soon as it is loaded: so that
 * the lab can be seen to notice it.
 */
#include <linux/bug.h>
#include <linux/module.h>
#include <linux/panic.h>
#include <linux/preempt.h>
#include <linux/string.h>

static char *kind = "";
module_param(kind, charp, 0);
MODULE_PARM_DESC(kind, "warn, oops, bug, panic or softlockup");

static int __init fault_init(void)
{
	if (!strcmp(kind, "warn")) {
		WARN_ON(1);
	} else if (!strcmp(kind, "oops")) {
		*(volatile int *)8 = 1;
	} else if (!strcmp(kind, "bug")) {
		BUG();
	} else if (!strcmp(kind, "panic")) {
		panic("as it was asked for");
	} else if (!strcmp(kind, "softlockup")) {
		preempt_disable();
		for (;;)
			cpu_relax();
	}
	return 0;
}

static void __exit fault_exit(void)
{
}

module_init(fault_init);
module_exit(fault_exit);

MODULE_DESCRIPTION("Does wrong on request");
MODULE_LICENSE("GPL");
