// SPDX-License-Identifier: GPL-2.0
/*
 * Has the TSC begin anew when the host wakes, as it does after S3 on many
 * machines: by a write of 0, which is what a reset leaves there (SDM volume 3,
 * "Time-Stamp Counter").  Loaded before exitmeter, as those who come first
 * wake first (syscore_resume() in drivers/base/syscore.c).
 *
 * The host must have another clock source: clocksource=acpi_pm tsc=unstable.
 */
#include <linux/module.h>
#include <linux/syscore_ops.h>
#include <asm/msr.h>

static void newtsc_resume(void *data)
{
	u64 before = rdtsc();

	wrmsrq(MSR_IA32_TSC, 0);
	pr_info("newtsc: the TSC was %llu and is %llu\n", before, rdtsc());
}

static const struct syscore_ops newtsc_ops = {
	.resume = newtsc_resume,
};

static struct syscore newtsc_syscore = {
	.ops = &newtsc_ops,
};

static int __init newtsc_init(void)
{
	register_syscore(&newtsc_syscore);
	return 0;
}

static void __exit newtsc_exit(void)
{
	unregister_syscore(&newtsc_syscore);
}

module_init(newtsc_init);
module_exit(newtsc_exit);

MODULE_DESCRIPTION("A TSC that begins anew");
MODULE_LICENSE("GPL");
