// SPDX-License-Identifier: GPL-2.0
/*
 * The C half of exitmeter: tracepoint and ftrace registration, and readers of
 * what the kernel offers to C as macros or inline functions alone.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cfi.h>
#include <linux/ftrace.h>
#include <linux/kprobes.h>
#include <linux/kvm_host.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/ratelimit.h>
#include <linux/tracepoint.h>
#include <linux/uaccess.h>

#include <asm/cpufeature.h>
#include <asm/ibt.h>
#include <asm/processor.h>
#include <asm/tsc.h>

#include "shim.h"

/* Exported by kvm.ko; their declaration is in a header private to KVM. */
DECLARE_TRACEPOINT(kvm_exit);
DECLARE_TRACEPOINT(kvm_entry);

int exitmeter_attach_exit(exitmeter_exit_probe probe, void *data)
{
	return tracepoint_probe_register(&__tracepoint_kvm_exit, probe, data);
}

/* Return after the last run of @probe: its code and @data may go then. */
void exitmeter_detach_exit(exitmeter_exit_probe probe, void *data)
{
	tracepoint_probe_unregister(&__tracepoint_kvm_exit, probe, data);
	tracepoint_synchronize_unregister();
}

int exitmeter_attach_entry(exitmeter_entry_probe probe, void *data)
{
	return tracepoint_probe_register(&__tracepoint_kvm_entry, probe, data);
}

/* Return after the last run of @probe: its code and @data may go then. */
void exitmeter_detach_entry(exitmeter_entry_probe probe, void *data)
{
	tracepoint_probe_unregister(&__tracepoint_kvm_entry, probe, data);
	tracepoint_synchronize_unregister();
}

/*
 * Return after the last run of @ops->func, and after every task has left the
 * code that a redirect sent it to: unregistering waits for RCU-tasks.
 */
void exitmeter_detach_function(struct ftrace_ops *ops)
{
	unregister_ftrace_function(ops);
	ftrace_free_filter(ops);
}

/* Whether @ip lies in the code of this module. */
bool exitmeter_is_own_text(unsigned long ip)
{
	return within_module(ip, THIS_MODULE);
}

DEFINE_PER_CPU_ALIGNED(struct exitmeter_note, exitmeter_note);

/*
 * Have no CPU remember @vcpu, which runs nowhere any more.
 *
 * A CPU that notes another vCPU at this moment may lose that note, and looks
 * the vCPU up at its next event.
 */
void exitmeter_forget(unsigned long vcpu)
{
	int cpu;

	for_each_possible_cpu(cpu) {
		struct exitmeter_note *note = per_cpu_ptr(&exitmeter_note, cpu);

		if (READ_ONCE(note->vcpu) == vcpu)
			WRITE_ONCE(note->vcpu, 0);
	}
}

/* Whether an ENDBR is at @address. */
static bool has_endbr(unsigned long address)
{
	u32 first;

	return !get_kernel_nofault(first, (u32 *)address) &&
	       first == gen_endbr();
}

/* Whether an ENDBR is at @address, or was until the kernel took it away. */
static bool had_endbr(unsigned long address)
{
	u32 first;

	return !get_kernel_nofault(first, (u32 *)address) && __is_endbr(first);
}

/*
 * Return the address of a function, "module:name" or "name", or 0.
 *
 * kallsyms is closed to modules; a kprobe that is registered and dropped at
 * once tells the address as well, but behind the ENDBR if there is one.
 */
unsigned long exitmeter_find_function(const char *name)
{
	/* Not armed: no code is changed for it. */
	struct kprobe probe = {
		.symbol_name = name,
		.flags = KPROBE_FLAG_DISABLED,
	};
	unsigned long address;

	if (register_kprobe(&probe))
		return 0;
	address = (unsigned long)probe.addr;
	unregister_kprobe(&probe);

	if (had_endbr(address - ENDBR_INSN_SIZE))
		address -= ENDBR_INSN_SIZE;
	return address;
}

/*
 * Call @ops->func at each entry of the function @name, "module:name", from now
 * on.
 *
 * The address is found first, as to match a name ftrace looks up the names of
 * all functions there are.
 *
 * PERMANENT has "sysctl kernel.ftrace_enabled=0" refused while the hook is in
 * place, instead of having it taken away behind the meter's back.  Linux 7.3
 * refuses that anyway; kernels before it need the flag.
 */
int exitmeter_attach_function(struct ftrace_ops *ops, const char *name,
			      bool redirect)
{
	unsigned long function = exitmeter_find_function(name);
	int ret;

	if (!function)
		return -ENOENT;

	ops->flags = FTRACE_OPS_FL_PERMANENT;
	if (redirect)
		ops->flags |= FTRACE_OPS_FL_IPMODIFY;
#ifndef CONFIG_HAVE_DYNAMIC_FTRACE_WITH_ARGS
#error "exitmeter needs DYNAMIC_FTRACE_WITH_ARGS"
#endif

	ret = ftrace_set_filter_ip(ops, function, 0, 1);
	if (ret)
		return ret;

	ret = register_ftrace_function(ops);
	if (ret)
		ftrace_free_filter(ops);
	return ret;
}

#ifdef CONFIG_CFI
/*
 * Whether CFI takes @function for one of the type that @like has.
 *
 * What it compares is ahead of the function: a hash of the type, where kCFI has
 * it or where FineIBT has it (arch/x86/kernel/alternative.c).  It is taken away
 * from a function that nobody calls indirectly.  The last bytes are left out:
 * call depth tracking has code there that is each function's own.
 */
static bool has_type_of(unsigned long function, unsigned long like)
{
	u8 theirs[CFI_OFFSET > 7 ? CFI_OFFSET - 7 : CFI_OFFSET];
	u8 ours[sizeof(theirs)];

	return !copy_from_kernel_nofault(theirs, (void *)(function - CFI_OFFSET),
					 sizeof(theirs)) &&
	       !copy_from_kernel_nofault(ours, (void *)(like - CFI_OFFSET),
					 sizeof(ours)) &&
	       !memcmp(theirs, ours, sizeof(ours));
}
#else
static bool has_type_of(unsigned long function, unsigned long like)
{
	return true;
}
#endif

/*
 * Whether an indirect call to @function is allowed on this CPU, as a function
 * of the type of @like, which is one of our own that may be called.
 *
 * A function that nobody calls indirectly has lost its ENDBR; under Indirect
 * Branch Tracking a call to it is a fault.  Under FineIBT each function has,
 * also @like: such a call goes to the ENDBR ahead of it.
 */
bool exitmeter_may_call(unsigned long function, unsigned long like)
{
	return has_type_of(function, like) &&
	       (!cpu_feature_enabled(X86_FEATURE_IBT) || has_endbr(function) ||
		!has_endbr(like));
}

/*
 * SVM keeps the exit code in the VMCB, behind a struct that is private to
 * kvm_amd.  Its own reader is used instead of a guess about that struct.
 */
typedef void (*svm_exit_info)(struct kvm_vcpu *vcpu, u32 *reason, u64 *info1,
			      u64 *info2, u32 *intr_info, u32 *error_code);

static svm_exit_info svm_get_exit_info;

/* A function of that type. */
static void svm_no_exit_info(struct kvm_vcpu *vcpu, u32 *reason, u64 *info1,
			     u64 *info2, u32 *intr_info, u32 *error_code)
{
}

static int svm_find_exit_info(void)
{
	unsigned long function;

	function = exitmeter_find_function("kvm_amd:svm_get_exit_info");
	if (!function)
		return -ENOENT;
	if (!exitmeter_may_call(function, (unsigned long)svm_no_exit_info))
		return -ENOEXEC;
	WRITE_ONCE(svm_get_exit_info, (svm_exit_info)function);
	return 0;
}

/*
 * kvm_amd may be taken out and put back while the meter stays.  No vCPU of it
 * runs then, so no exit can race with the pointer.
 */
static int svm_module_event(struct notifier_block *nb, unsigned long event,
			    void *data)
{
	struct module *mod = data;
	int ret = 0;

	if (strcmp(mod->name, "kvm_amd"))
		return NOTIFY_DONE;

	if (event == MODULE_STATE_LIVE)
		ret = svm_find_exit_info();
	else if (event == MODULE_STATE_GOING)
		WRITE_ONCE(svm_get_exit_info, NULL);
	if (ret)
		pr_err("svm_get_exit_info %s in the new kvm_amd: its exits are counted without their code\n",
		       ret == -ENOENT ? "not found" : "not callable");

	return NOTIFY_OK;
}

static struct notifier_block svm_notifier = {
	.notifier_call = svm_module_event,
};

int exitmeter_attach_svm(void)
{
	int ret = register_module_notifier(&svm_notifier);

	if (ret)
		return ret;
	ret = svm_find_exit_info();
	if (ret)
		unregister_module_notifier(&svm_notifier);
	return ret;
}

void exitmeter_detach_svm(void)
{
	unregister_module_notifier(&svm_notifier);
	WRITE_ONCE(svm_get_exit_info, NULL);
}

/*
 * Return the exit code of the exit that @vcpu has just taken, on its CPU.
 *
 * Called at every exit.  What KVM writes through the pointers is neither kept
 * nor needed before, and all of it are scalars: zeroes first and a canary
 * after would cost more than the call.
 */
__no_stack_protector
u32 exitmeter_svm_exit_code(struct kvm_vcpu *vcpu)
{
	u32 __uninitialized intr_info, error_code;
	u64 __uninitialized info1, info2;
	u32 reason = U32_MAX - 15;	/* no code: counted among "other" */
	svm_exit_info get_exit_info = READ_ONCE(svm_get_exit_info);

	if (likely(get_exit_info))
		get_exit_info(vcpu, &reason, &info1, &info2, &intr_info,
			      &error_code);
	return reason;
}

enum exitmeter_vendor exitmeter_vendor(void)
{
	switch (boot_cpu_data.x86_vendor) {
	case X86_VENDOR_INTEL:
	case X86_VENDOR_CENTAUR:
	case X86_VENDOR_ZHAOXIN:
		return EXITMETER_VENDOR_VMX;
	case X86_VENDOR_AMD:
	case X86_VENDOR_HYGON:
		return EXITMETER_VENDOR_SVM;
	default:
		return EXITMETER_VENDOR_OTHER;
	}
}

u32 exitmeter_tsc_khz(void)
{
	return tsc_khz;
}

bool exitmeter_tsc_unstable(void)
{
	return check_tsc_unstable();
}

/*
 * A sweep over all reasons with both leaves, run twice at full speed, shows
 * whole; a guest that floods gets some ten lines a second on the long run.
 */
static DEFINE_RATELIMIT_STATE(log_limit, 30 * HZ, 400);

bool exitmeter_log_allowed(void)
{
	return __ratelimit(&log_limit);
}
