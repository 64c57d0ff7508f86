/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the C half of exitmeter offers to the Rust half.
 *
 * The C half holds only what Rust cannot name: macros, inline functions and
 * the tracepoints.  It decides nothing; every policy is in Rust.
 */
#ifndef EXITMETER_SHIM_H
#define EXITMETER_SHIM_H

#include <linux/percpu-defs.h>
#include <linux/types.h>

struct ftrace_ops;
struct kvm_vcpu;

/* The tracepoints kvm:kvm_exit and kvm:kvm_entry. */
typedef void (*exitmeter_exit_probe)(void *data, struct kvm_vcpu *vcpu,
				     u32 isa);
typedef void (*exitmeter_entry_probe)(void *data, struct kvm_vcpu *vcpu,
				      bool force_immediate_exit);

int exitmeter_attach_exit(exitmeter_exit_probe probe, void *data);
void exitmeter_detach_exit(exitmeter_exit_probe probe, void *data);
int exitmeter_attach_entry(exitmeter_entry_probe probe, void *data);
void exitmeter_detach_entry(exitmeter_entry_probe probe, void *data);

/* Functions of KVM, by name, through ftrace. */
int exitmeter_attach_function(struct ftrace_ops *ops, const char *name,
			      bool redirect);
void exitmeter_detach_function(struct ftrace_ops *ops);
bool exitmeter_is_own_text(unsigned long ip);

/*
 * The vCPU that a CPU metered last, and what the Rust half keeps of it.  Read
 * and written by the CPU itself, with preemption off; others only forget.
 */
struct exitmeter_note {
	unsigned long vcpu;
	unsigned long value;
};

DECLARE_PER_CPU(struct exitmeter_note, exitmeter_note);
void exitmeter_forget(unsigned long vcpu);

/* Symbols of modules. */
unsigned long exitmeter_find_function(const char *name);
bool exitmeter_may_call(unsigned long function, unsigned long like);

/* SVM: where KVM keeps the exit code. */
int exitmeter_attach_svm(void);
void exitmeter_detach_svm(void);
u32 exitmeter_svm_exit_code(struct kvm_vcpu *vcpu);

/* The host's CPU and its clock. */
enum exitmeter_vendor {
	EXITMETER_VENDOR_OTHER,
	EXITMETER_VENDOR_VMX,
	EXITMETER_VENDOR_SVM,
};

enum exitmeter_vendor exitmeter_vendor(void);
u32 exitmeter_tsc_khz(void);
bool exitmeter_tsc_unstable(void);

/* Whether one more line about a guest's query may go to the kernel log. */
bool exitmeter_log_allowed(void);

#endif /* EXITMETER_SHIM_H */
