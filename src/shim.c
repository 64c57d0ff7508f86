// SPDX-License-Identifier: GPL-2.0
/*
 * The C half of exitmeter: registration of tracepoints and ftrace callbacks, and
 * functions around what the kernel offers only as C macros or inline functions.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/cfi.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/jump_label.h>
#include <linux/kprobes.h>
#include <linux/kvm_host.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/random.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/syscore_ops.h>
#include <linux/timekeeping.h>
#include <linux/tracepoint.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include <asm/cpufeature.h>
#include <asm/ibt.h>
#include <asm/mshyperv.h>
#include <asm/processor.h>
#include <asm/tsc.h>

#include "shim.h"

/*
 * The module's parameters.  Those of the kernel's crate are not in sysfs
 * (rust/macros/module.rs), where a program that reloads the module, such as
 * exitmeter verify, reads them.  All have type long, so that a value out of its
 * range reaches the Rust half, which logs the range; the kernel would only say
 * that the value is invalid.
 */
struct exitmeter_parameters exitmeter_given = {
	.leaf_map = 2021,
	.leaf_cpl = 3,
	.log_queries = 1,
	.max_vcpus = 4096,
	.copy_tries = 24,
};

module_param_named(leaf_map, exitmeter_given.leaf_map, long, 0444);
MODULE_PARM_DESC(leaf_map, "Order of the CPUID leaves 0x4FFFFFFC to 0x4FFFFFFF: 2021, 2022, or 0 to answer none");

module_param_named(leaf_cpl, exitmeter_given.leaf_cpl, long, 0444);
MODULE_PARM_DESC(leaf_cpl, "Highest CPL of a guest that gets answers: 3 for everyone, 0 for its kernel only; others get KVM's own answer");

module_param_named(host_scope, exitmeter_given.host_scope, long, 0444);
MODULE_PARM_DESC(host_scope, "1: guests read the sums of the whole host instead of their own VM's");

module_param_named(log_queries, exitmeter_given.log_queries, long, 0444);
MODULE_PARM_DESC(log_queries, "1: one line in the kernel log for each query of a guest, rate limited");

module_param_named(max_vcpus, exitmeter_given.max_vcpus, long, 0444);
MODULE_PARM_DESC(max_vcpus, "Maximum number of vCPUs metered at a time, 1 to 65536; 16 KiB each");

module_param_named(details, exitmeter_given.details, long, 0444);
MODULE_PARM_DESC(details, "1: always record details of exits and the guest code that caused them; 48 KiB more for each vCPU");

module_param_named(slow_us, exitmeter_given.slow_us, long, 0444);
MODULE_PARM_DESC(slow_us, "With details: each vCPU has a ring of its latest 64 exits, which freezes at an exit of more microseconds than this; 0: no rings");

module_param_named(copy_tries, exitmeter_given.copy_tries, long, 0444);
MODULE_PARM_DESC(copy_tries, "Attempts to copy a running vCPU's numbers before its CPU is interrupted, 0 to 24");

/* The module macro of the kernel's crate has no field for this (rust/macros/module.rs). */
MODULE_VERSION(EXITMETER_VERSION);

/* Exported by kvm.ko, but declared in a header private to KVM. */
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
 * Return after the last run of @ops->func.  Only a task that sleeps in the code
 * to which a redirect sent it may still be there: ftrace_shutdown() waits for
 * RCU-tasks, that is, for all tasks that do not sleep.
 */
void exitmeter_detach_function(struct ftrace_ops *ops)
{
	unregister_ftrace_function(ops);
	ftrace_free_filter(ops);
}

/* Return true if @ip lies in the code of this module. */
bool exitmeter_is_own_text(unsigned long ip)
{
	return within_module(ip, THIS_MODULE);
}

/*
 * Number of tasks that entered each place on this CPU, less those that left it
 * on this CPU.  A task may leave on another CPU, so only the sum has a meaning.
 */
static DEFINE_PER_CPU(long[EXITMETER_PLACES], tasks_inside);

/* Places that refuse tasks which try to enter. */
static bool is_closed[EXITMETER_PLACES];

void exitmeter_enter(enum exitmeter_place place)
{
	this_cpu_inc(tasks_inside[place]);
}

/*
 * Enter @place unless it is closed.
 *
 * The barrier pairs with that of exitmeter_close(): either this task sees that
 * the place is closed, or the closing task sees this task inside.  Preemption is
 * off, so that a task that is refused counts up and down on one CPU: no sum is
 * ever too low because of it.
 */
bool exitmeter_try_enter(enum exitmeter_place place)
{
	bool closed;

	preempt_disable();
	this_cpu_inc(tasks_inside[place]);
	smp_mb(); /* pairs with exitmeter_close() */
	closed = READ_ONCE(is_closed[place]);
	if (closed)
		this_cpu_dec(tasks_inside[place]);
	preempt_enable();
	return !closed;
}

void exitmeter_leave(enum exitmeter_place place)
{
	/* All that was done inside comes before. */
	barrier();
	this_cpu_dec(tasks_inside[place]);
}

void exitmeter_close(enum exitmeter_place place, bool closed)
{
	WRITE_ONCE(is_closed[place], closed);
	smp_mb(); /* pairs with exitmeter_try_enter() */
}

/*
 * Return the number of tasks in @place, or more; 0 only if there is none.
 *
 * No task may enter the place any more; a task that is refused counts only for a
 * moment.  A task that leaves during the sum lowers a number that may have been
 * added already, so the sum is never too low.
 */
long exitmeter_inside(enum exitmeter_place place)
{
	long sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += READ_ONCE(*per_cpu_ptr(&tasks_inside[place], cpu));
	return sum;
}

/*
 * Return when every task that no longer sleeps, and was about to leave the
 * module's code, has left it.
 *
 * If kernel code can be preempted, this waits until each task has slept by its
 * own wish or been in user mode.  Otherwise TASKS_RCU is off
 * (kernel/rcu/Kconfig) and this is synchronize_rcu() (linux/rcupdate.h): each
 * CPU has switched tasks or been in user mode once, which none can do in the
 * rest of that code.
 */
void exitmeter_wait_for_tails(void)
{
	synchronize_rcu_tasks();
}

/* Sleep for @ms, without counting as load or as a hung task. */
void exitmeter_doze(unsigned int ms)
{
	schedule_timeout_idle(msecs_to_jiffies(ms));
}

DEFINE_PER_CPU_ALIGNED(struct exitmeter_cache, exitmeter_cache);

/*
 * Remove @vcpu, which runs nowhere any more, from all CPUs' caches.
 *
 * A CPU that caches another vCPU at this moment may lose that one, and then
 * looks it up at its next event.
 */
void exitmeter_forget(unsigned long vcpu)
{
	int cpu;

	for_each_possible_cpu(cpu) {
		struct exitmeter_cache *cache = per_cpu_ptr(&exitmeter_cache, cpu);

		if (READ_ONCE(cache->vcpu) == vcpu)
			WRITE_ONCE(cache->vcpu, 0);
	}
}

/*
 * Return zeroed memory, charged to the cgroup of the current task, or NULL.
 *
 * An allocation that may not sleep does not use the emergency reserves either:
 * GFP_NOWAIT, not GFP_ATOMIC.
 */
void *exitmeter_allocate(size_t size, bool may_sleep)
{
	/* The page allocator would round a vCPU's 48 KiB of tables up to 64. */
	if (may_sleep && size > SZ_32K && size < SZ_64K)
		return __vmalloc(size, GFP_KERNEL_ACCOUNT | __GFP_ZERO);
	if (may_sleep)
		return kvzalloc(size, GFP_KERNEL_ACCOUNT);
	return kzalloc(size, GFP_NOWAIT | __GFP_NOWARN | __GFP_ACCOUNT);
}

/* ftrace's callbacks call this too, and may run with preemption off. */
void exitmeter_free(void *memory)
{
	kvfree_atomic(memory);
}

/* An object of the Rust half, which leaves the first bytes to RCU. */
struct exitmeter_retired {
	struct rcu_head rcu;
};

/*
 * Free @memory after a grace period.  @room is its start, with space for an
 * rcu_head.
 */
void exitmeter_retire(void *memory, void *room)
{
	struct exitmeter_retired *retired = memory;

	if (WARN_ON_ONCE(memory != room))
		return;
	kvfree_rcu(retired, rcu);
}

bool exitmeter_may_sleep(void)
{
	return preemptible();
}

void exitmeter_pause(void)
{
	cond_resched();
}

/*
 * Run @function on @cpu, in an interrupt, and wait until it returns.  Return
 * false if the CPU is offline.
 */
bool exitmeter_call_on(u32 cpu, void (*function)(void *info), void *info)
{
	return !smp_call_function_single(cpu, function, info, 1);
}

/* The test of kvm_sched_out(), but for any ioctl. */
bool exitmeter_current_is_runnable(void)
{
	return task_is_runnable(current);
}

u64 exitmeter_random(void)
{
	return get_random_u64();
}

/* Return the four bytes at @address, or 0. */
static u32 four_bytes(unsigned long address)
{
	u32 bytes;

	return get_kernel_nofault(bytes, (u32 *)address) ? 0 : bytes;
}

#ifdef CONFIG_X86_KERNEL_IBT

/* Return true if an ENDBR is at @address. */
static bool has_endbr(unsigned long address)
{
	return four_bytes(address) == gen_endbr();
}

/* Return true if an ENDBR is at @address, or a sealed one. */
static bool had_endbr(unsigned long address)
{
	return __is_endbr(four_bytes(address));
}

#else

static bool has_endbr(unsigned long address) { return false; }
static bool had_endbr(unsigned long address) { return false; }

#endif

/*
 * Return the address of a function, "module:name" or "name", or 0.
 *
 * kallsyms is closed to modules, so this registers a kprobe and removes it at
 * once.  Its address is behind the ENDBR, if there is or was one
 * (arch_adjust_kprobe_addr()).
 */
unsigned long exitmeter_find_function(const char *name)
{
	/* Not armed, so no code is changed. */
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
 * Return the contents of a file of /sys/kernel/btf, or NULL.  The kernel has
 * them in memory, but a module cannot take and release a reference to them:
 * bpf_find_btf_id() is exported, btf_put() is not.
 *
 * kernel_read_file() is not used because it takes the purpose of the file, and
 * IPE warns of a purpose that it does not know (ipe_kernel_read_file()).  It
 * knows none for this file.
 */
void *exitmeter_read_types(const char *path, size_t *size)
{
	struct file *file = filp_open(path, O_RDONLY, 0);
	void *types = NULL;
	loff_t pos = 0;
	loff_t end;

	if (IS_ERR(file))
		return NULL;
	end = i_size_read(file_inode(file));
	if (end > 0 && end <= SZ_64M)
		types = vmalloc(end);
	while (types && pos < end) {
		if (kernel_read(file, types + pos, end - pos, &pos) > 0)
			continue;
		vfree(types);
		types = NULL;
	}
	filp_close(file, NULL);
	*size = end;
	return types;
}

void exitmeter_free_types(void *types)
{
	vfree(types);
}

/*
 * Check the arguments that the trampolines save.  kvm_emulate_cpuid() has one,
 * which is not checked: its declaration is in a header private to KVM.
 */
static_assert(__same_type(kvm_arch_vcpu_load,
			  void(struct kvm_vcpu *vcpu, int cpu)));
static_assert(__same_type(kvm_arch_vcpu_put, void(struct kvm_vcpu *vcpu)));

static void (*const trampolines[])(void) = {
	[EXITMETER_TRAMPOLINE_LOAD] = exitmeter_trampoline_load,
	[EXITMETER_TRAMPOLINE_PUT] = exitmeter_trampoline_put,
	[EXITMETER_TRAMPOLINE_CPUID] = exitmeter_trampoline_cpuid,
};

/*
 * Call @ops->func at each entry of the function @name, "module:name", from now
 * on.  While the function has no other user, call @trampoline instead, if there
 * is one.
 *
 * x86 lets a user of ftrace bring a trampoline of its own, and does not change
 * it (arch_ftrace_update_trampoline()).  A function can have only one direct
 * call, but any number of these: with a second user, ftrace switches to
 * @ops->func by itself.
 *
 * The function is filtered by its address, because to match a name ftrace looks
 * up the names of all functions that it knows.
 *
 * PERMANENT makes the kernel refuse "sysctl kernel.ftrace_enabled=0" while the
 * hook is in place, which would silently disable it.  Linux 7.3 refuses that
 * anyway; kernels before it need the flag.
 */
int exitmeter_attach_function(struct ftrace_ops *ops, const char *name,
			      enum exitmeter_trampoline trampoline,
			      bool redirect)
{
	unsigned long function = exitmeter_find_function(name);
	int ret;

	if (!function)
		return -ENOENT;

	ops->flags = FTRACE_OPS_FL_PERMANENT;
	if (redirect)
		ops->flags |= FTRACE_OPS_FL_IPMODIFY;
	ops->trampoline = (unsigned long)trampolines[trampoline];
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
 * Return true if, for CFI, @function has the type of @like.
 *
 * CFI compares a hash of the type ahead of the function, at the place of kCFI or
 * of FineIBT (arch/x86/kernel/alternative.c).  A function that is never called
 * indirectly has lost its hash.  The last bytes are left out: call depth
 * tracking has code there that differs from function to function.
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
 * Return true if an indirect call to @function is allowed on this CPU.  @like is
 * a function of ours that has the type of the call, and may be called.
 *
 * A function that is never called indirectly has lost its ENDBR; under Indirect
 * Branch Tracking a call to it is a fault.  Under FineIBT all functions have
 * lost it, @like too: such a call goes to the ENDBR ahead of the function.
 */
bool exitmeter_may_call(unsigned long function, unsigned long like)
{
	return has_type_of(function, like) &&
	       (!cpu_feature_enabled(X86_FEATURE_IBT) || has_endbr(function) ||
		!has_endbr(like));
}

/*
 * KVM's own reader of the exit code, one for each vendor.
 *
 * SVM keeps the code in the VMCB, behind a struct that is private to kvm_amd;
 * an enlightened VMCS is private to kvm_intel.
 */
typedef void (*exit_reader)(struct kvm_vcpu *vcpu, u32 *reason, u64 *info1,
			    u64 *info2, u32 *intr_info, u32 *error_code);

static_assert(__same_type(((struct kvm_x86_ops *)NULL)->get_exit_info,
			  (exit_reader)NULL));

static exit_reader read_exit;

/* Name of each vendor's module, and the possible names of its reader. */
static const struct {
	const char *module;
	const char *functions[2];
} readers[] = {
	[EXITMETER_VENDOR_VMX] = {
		.module = "kvm_intel",
		/* The first is in the ops with TDX, the second without. */
		.functions = {
			"kvm_intel:vt_get_exit_info",
			"kvm_intel:vmx_get_exit_info",
		},
	},
	[EXITMETER_VENDOR_SVM] = {
		.module = "kvm_amd",
		.functions = { "kvm_amd:svm_get_exit_info" },
	},
};

static enum exitmeter_vendor readers_vendor;

/* A function of the reader's type, for exitmeter_may_call(). */
static void read_nothing(struct kvm_vcpu *vcpu, u32 *reason, u64 *info1,
			 u64 *info2, u32 *intr_info, u32 *error_code)
{
}

static int find_reader(void)
{
	const char *const *functions = readers[readers_vendor].functions;
	int ret = -ENOENT;
	int i;

	for (i = 0; i < ARRAY_SIZE(readers[0].functions) && functions[i]; i++) {
		unsigned long function = exitmeter_find_function(functions[i]);

		if (!function)
			continue;
		if (exitmeter_may_call(function, (unsigned long)read_nothing)) {
			WRITE_ONCE(read_exit, (exit_reader)function);
			return 0;
		}
		ret = -ENOEXEC;
	}
	return ret;
}

/*
 * The vendor's module may be unloaded and loaded again while the meter stays.
 * No vCPU runs then, so no exit can race with the pointer.
 *
 * A module that is coming is complete before its first instruction runs: its
 * ENDBRs are sealed (module_finalize()), kallsyms has it, and kprobes accepts
 * it, as trace_kprobe_module_callback() relies on at the same moment.
 */
static int vendor_module_event(struct notifier_block *nb, unsigned long event,
			       void *data)
{
	struct module *mod = data;
	int ret = 0;

	if (strcmp(mod->name, readers[readers_vendor].module))
		return NOTIFY_DONE;

	if (event == MODULE_STATE_COMING)
		ret = find_reader();
	else if (event == MODULE_STATE_GOING)
		WRITE_ONCE(read_exit, NULL);
	if (ret)
		pr_err("the reader of exit codes %s in the new %s: its exits are counted without their code\n",
		       ret == -ENOENT ? "not found" : "not callable", mod->name);

	return NOTIFY_OK;
}

static struct notifier_block vendor_notifier = {
	.notifier_call = vendor_module_event,
};

int exitmeter_attach_reader(enum exitmeter_vendor vendor)
{
	int ret;

	readers_vendor = vendor;
	ret = register_module_notifier(&vendor_notifier);
	if (ret)
		return ret;
	ret = find_reader();
	if (ret)
		unregister_module_notifier(&vendor_notifier);
	return ret;
}

void exitmeter_detach_reader(void)
{
	unregister_module_notifier(&vendor_notifier);
	WRITE_ONCE(read_exit, NULL);
}

/*
 * Read the exit that @vcpu has just taken, on its CPU.  Called at every exit on
 * SVM, and under Hyper-V.
 *
 * vmx_get_exit_info() and svm_get_exit_info() write all of their arguments.
 */
void exitmeter_read_exit(struct kvm_vcpu *vcpu,
			 struct exitmeter_exit_info *info)
{
	exit_reader reader = READ_ONCE(read_exit);

	if (unlikely(!reader)) {
		/* A code without a slot: counted as "other". */
		*info = (struct exitmeter_exit_info){ .code = U32_MAX - 15 };
		return;
	}
	reader(vcpu, &info->code, &info->info1, &info->info2, &info->intr_info,
	       &info->error_code);
}

/*
 * Return the code of the hypercall that @vcpu has just exited for, or -1 if the
 * guest's hypercalls are not Hyper-V's.
 *
 * This does what kvm_hv_hypercall_enabled(), is_64_bit_hypercall() and
 * kvm_hv_hypercall() do, which are private to KVM.
 */
int exitmeter_hyperv_call(struct kvm_vcpu *vcpu)
{
#ifdef CONFIG_KVM_HYPERV
	bool is_64_bit = vcpu->arch.guest_state_protected;
	int db, l;

	if (!vcpu->arch.hyperv_enabled ||
	    !READ_ONCE(vcpu->kvm->arch.hyperv.hv_guest_os_id))
		return -1;
	if (!is_64_bit && vcpu->arch.efer & EFER_LMA) {
		static_call(kvm_x86_get_cs_db_l_bits)(vcpu, &db, &l);
		is_64_bit = l;
	}
	return vcpu->arch.regs[is_64_bit ? VCPU_REGS_RCX : VCPU_REGS_RAX] & 0xffff;
#else
	return -1;
#endif
}

/*
 * The key of the static branch for details.  It is in a struct because the
 * kernel's macro for Rust takes a key that is a field.
 */
struct exitmeter_switch {
	struct static_key_false key;
};

struct exitmeter_switch exitmeter_details = {
	.key = STATIC_KEY_FALSE_INIT,
};

/* Return when all CPUs have seen the change.  Callers take turns. */
void exitmeter_switch_details(bool on)
{
	if (on)
		static_branch_enable(&exitmeter_details.key);
	else
		static_branch_disable(&exitmeter_details.key);
}

/* The right that perf_event_open() requires for guests and their kernels. */
bool exitmeter_may_see_details(void)
{
	return perfmon_capable();
}

/*
 * Return true if KVM may use Hyper-V's enlightened VMCS.
 *
 * This is the test of hv_init_evmcs() of kvm_intel, without its parameter
 * enlightened_vmcs, which may change when kvm_intel is loaded again.
 */
bool exitmeter_has_enlightened_vmcs(void)
{
#if IS_ENABLED(CONFIG_HYPERV)
	return ms_hyperv.hints & HV_X64_ENLIGHTENED_VMCS_RECOMMENDED &&
	       (ms_hyperv.nested_features & HV_X64_ENLIGHTENED_VMCS_VERSION);
#else
	return false;
#endif
}

/*
 * Return the privilege level at which @vcpu has just exited, 0 to 3, or -1 if
 * the host cannot know it.
 *
 * The caller has @vcpu loaded, between exit and entry.  KVM itself reads the
 * level at the same place, in kvm_is_cpuid_allowed(): on VMX from the VMCS, or
 * from its cache of the VMCS since this exit, on SVM from the VMCB.
 *
 * For a guest with encrypted registers, KVM returns the level that the guest
 * reported last (sev_es_sync_from_ghcb), 0 if it reported none, and 0 for a
 * trust domain.
 */
int exitmeter_cpl(struct kvm_vcpu *vcpu)
{
	if (vcpu->arch.guest_state_protected)
		return -1;
	return static_call(kvm_x86_get_cpl)(vcpu);
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
 * The TSC may restart, or stand still, while the host sleeps (S3, S4).  When
 * these functions run, only one CPU is online, interrupts are off, and all tasks
 * are frozen.  Timekeeping is suspended after this and resumed before it,
 * because it was registered first.
 */
static exitmeter_rebase sleep_rebase;
static u64 sleep_tsc, sleep_boottime;

/*
 * Allowed difference between a TSC that went on and the time slept, in ms: the
 * clock that measures the sleep may have a resolution of seconds.
 */
#define SLEEP_SLACK_MS 2000

static int sleep_suspend(void *data)
{
	sleep_tsc = rdtsc();
	sleep_boottime = ktime_get_boottime_ns();
	return 0;
}

static void sleep_resume(void *data)
{
	u64 slept = ktime_get_boottime_ns() - sleep_boottime;
	u64 now = rdtsc();
	u64 then = sleep_tsc + mul_u64_u32_div(slept, tsc_khz, NSEC_PER_MSEC);

	if (now < sleep_tsc || now + (u64)tsc_khz * SLEEP_SLACK_MS < then)
		sleep_rebase(then, now);
}

static const struct syscore_ops sleep_ops = {
	.suspend = sleep_suspend,
	.resume = sleep_resume,
};

static struct syscore sleep_syscore = {
	.ops = &sleep_ops,
};

void exitmeter_attach_sleep(exitmeter_rebase rebase)
{
	sleep_rebase = rebase;
	register_syscore(&sleep_syscore);
}

void exitmeter_detach_sleep(void)
{
	unregister_syscore(&sleep_syscore);
}

u64 exitmeter_coarse_ns(void)
{
	return ktime_get_coarse_ns();
}
