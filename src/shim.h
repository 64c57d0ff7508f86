/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Interface of the C half of exitmeter for the Rust half.
 *
 * The C half has only what Rust cannot name: macros, inline functions, the
 * tracepoints and per-CPU variables.  All policy is in Rust.
 */
#ifndef EXITMETER_SHIM_H
#define EXITMETER_SHIM_H

#include <linux/percpu-defs.h>
#include <linux/types.h>

struct ftrace_ops;
struct kvm_vcpu;

/* The module's parameters, unchecked: see shim.c. */
struct exitmeter_parameters {
	long leaf_map;
	long leaf_cpl;
	long host_scope;
	long log_queries;
	long max_vcpus;
	long details;
	long slow_us;
	long copy_tries;
};

extern struct exitmeter_parameters exitmeter_given;

/* The tracepoints kvm:kvm_exit and kvm:kvm_entry. */
typedef void (*exitmeter_exit_probe)(void *data, struct kvm_vcpu *vcpu,
				     u32 isa);
typedef void (*exitmeter_entry_probe)(void *data, struct kvm_vcpu *vcpu,
				      u8 force_immediate_exit);

int exitmeter_attach_exit(exitmeter_exit_probe probe, void *data);
void exitmeter_detach_exit(exitmeter_exit_probe probe, void *data);
int exitmeter_attach_entry(exitmeter_entry_probe probe, void *data);
void exitmeter_detach_entry(exitmeter_entry_probe probe, void *data);

/* Functions of KVM that have a trampoline of ours: see trampolines.S. */
enum exitmeter_trampoline {
	EXITMETER_TRAMPOLINE_NONE,
	EXITMETER_TRAMPOLINE_LOAD,
	EXITMETER_TRAMPOLINE_PUT,
	EXITMETER_TRAMPOLINE_CPUID,
};

/* In trampolines.S.  Only ftrace calls these. */
void exitmeter_trampoline_load(void);
void exitmeter_trampoline_put(void);
void exitmeter_trampoline_cpuid(void);

/* Hooks of KVM's functions, by ftrace. */
int exitmeter_attach_function(struct ftrace_ops *ops, const char *name,
			      enum exitmeter_trampoline trampoline,
			      bool redirect);
void exitmeter_detach_function(struct ftrace_ops *ops);
bool exitmeter_is_own_text(unsigned long ip);

/* The module's code in which a task may sleep. */
enum exitmeter_place {
	EXITMETER_PLACE_CPUID,
	EXITMETER_PLACE_CREATION,
	EXITMETER_PLACES,
};

void exitmeter_enter(enum exitmeter_place place);
bool exitmeter_try_enter(enum exitmeter_place place);
void exitmeter_leave(enum exitmeter_place place);
void exitmeter_close(enum exitmeter_place place, bool closed);
long exitmeter_inside(enum exitmeter_place place);
void exitmeter_wait_for_tails(void);
void exitmeter_doze(unsigned int ms);

/*
 * The vCPU that a CPU metered last, and its ledger.  The CPU itself reads and
 * writes this, with preemption off.  Other CPUs only forget: they may write 0 to
 * vcpu at any moment.  A callback that has found its vCPU here reads it again
 * from kept, which no other CPU writes.
 */
struct exitmeter_cache {
	unsigned long vcpu;
	unsigned long ledger;
	unsigned long kept;
};

DECLARE_PER_CPU(struct exitmeter_cache, exitmeter_cache);
void exitmeter_forget(unsigned long vcpu);

/* Memory, and a test whether the context may wait for it. */
void *exitmeter_allocate(size_t size, bool may_sleep);
void exitmeter_free(void *memory);
void exitmeter_retire(void *memory, void *room);
bool exitmeter_may_sleep(void);
void exitmeter_pause(void);

/* Calls on another CPU, by an interrupt. */
bool exitmeter_call_on(u32 cpu, void (*function)(void *info), void *info);

/* The current task. */
bool exitmeter_current_is_runnable(void);

u64 exitmeter_random(void);

/* Functions of the kernel and its modules. */
unsigned long exitmeter_find_function(const char *name);
bool exitmeter_may_call(unsigned long function, unsigned long like);

/* The kernel's types: a file of /sys/kernel/btf. */
void *exitmeter_read_types(const char *path, size_t *size);
void exitmeter_free_types(void *types);

/* The guest's privilege level. */
int exitmeter_cpl(struct kvm_vcpu *vcpu);

/* The host's sleep, after which the TSC may restart. */
typedef void (*exitmeter_rebase)(u64 then, u64 now);

void exitmeter_attach_sleep(exitmeter_rebase rebase);
void exitmeter_detach_sleep(void);

/* The vendor of the host's CPU. */
enum exitmeter_vendor {
	EXITMETER_VENDOR_OTHER,
	EXITMETER_VENDOR_VMX,
	EXITMETER_VENDOR_SVM,
};

enum exitmeter_vendor exitmeter_vendor(void);
bool exitmeter_has_enlightened_vmcs(void);

/* KVM's own reader of the exit code. */
int exitmeter_attach_reader(enum exitmeter_vendor vendor);
void exitmeter_detach_reader(void);

/* An exit, as KVM's own reader returns it. */
struct exitmeter_exit_info {
	u64 info1;
	u64 info2;
	u32 code;
	u32 intr_info;
	u32 error_code;
};

void exitmeter_read_exit(struct kvm_vcpu *vcpu,
			 struct exitmeter_exit_info *info);
int exitmeter_hyperv_call(struct kvm_vcpu *vcpu);

/* The branch for details (exitmeter_details in shim.c), and who may see them. */
void exitmeter_switch_details(bool on);
bool exitmeter_may_see_details(void);

u32 exitmeter_tsc_khz(void);
bool exitmeter_tsc_unstable(void);

/* Monotonic time in ns, late by up to one tick, and cheap. */
u64 exitmeter_coarse_ns(void);

#endif /* EXITMETER_SHIM_H */
