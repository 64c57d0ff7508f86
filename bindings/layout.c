// SPDX-License-Identifier: GPL-2.0
/*
 * The layout of KVM's types by the compiler that builds the kernel.
 *
 * bindgen takes layouts from clang, but gcc may build the kernel.  Kbuild
 * compiles this file with the module's own flags, and makes each DEFINE a line of
 * layout.h.  src/bindings.rs asserts at build time that both compilers agree.
 */
#include <linux/kbuild.h>
#include <linux/kvm_host.h>
#include <linux/ftrace.h>

int main(void);
int main(void)
{
	DEFINE(LAYOUT_VCPU_KVM, offsetof(struct kvm_vcpu, kvm));
	DEFINE(LAYOUT_VCPU_CPU, offsetof(struct kvm_vcpu, cpu));
	DEFINE(LAYOUT_VCPU_ID, offsetof(struct kvm_vcpu, vcpu_id));
	DEFINE(LAYOUT_VCPU_PREEMPTED, offsetof(struct kvm_vcpu, preempted));
	DEFINE(LAYOUT_VCPU_SCHEDULED_OUT,
	       offsetof(struct kvm_vcpu, scheduled_out));
	DEFINE(LAYOUT_VCPU_HFLAGS, offsetof(struct kvm_vcpu, arch.hflags));
	DEFINE(LAYOUT_VCPU_REGS, offsetof(struct kvm_vcpu, arch.regs));
	DEFINE(LAYOUT_VCPU_EXCEPTION, offsetof(struct kvm_vcpu, arch.exception));
	DEFINE(LAYOUT_VCPU_EXCEPTION_VMEXIT,
	       offsetof(struct kvm_vcpu, arch.exception_vmexit));
	/*
	 * RIP follows R15: in Linux 7.2 as the next one of regs
	 * (VCPU_REGS_RIP), in 7.3 as the field behind regs (arch.rip).
	 */
	DEFINE(LAYOUT_VCPU_RIP,
	       offsetof(struct kvm_vcpu, arch.regs[VCPU_REGS_R15]) +
	       sizeof(unsigned long));
	DEFINE(LAYOUT_VCPU_PROTECTED,
	       offsetof(struct kvm_vcpu, arch.guest_state_protected));
	DEFINE(LAYOUT_VCPU_RUN, offsetof(struct kvm_vcpu, run));
	DEFINE(LAYOUT_VCPU_WANTS_TO_RUN,
	       offsetof(struct kvm_vcpu, wants_to_run));
	DEFINE(LAYOUT_RUN_EXIT_REASON, offsetof(struct kvm_run, exit_reason));
	DEFINE(LAYOUT_EXCEPTION_PENDING,
	       offsetof(struct kvm_queued_exception, pending));
	DEFINE(LAYOUT_EXCEPTION_VECTOR,
	       offsetof(struct kvm_queued_exception, vector));
	DEFINE(LAYOUT_VCPU_POLL_SUCCESS,
	       offsetof(struct kvm_vcpu, stat.generic.halt_poll_success_ns));
	DEFINE(LAYOUT_VCPU_POLL_FAIL,
	       offsetof(struct kvm_vcpu, stat.generic.halt_poll_fail_ns));
	DEFINE(LAYOUT_VCPU_BLOCKING,
	       offsetof(struct kvm_vcpu, stat.generic.blocking));
	DEFINE(LAYOUT_RCU_HEAD_SIZE, sizeof(struct rcu_head));
	DEFINE(LAYOUT_VCPU_SIZE, sizeof(struct kvm_vcpu));
	DEFINE(LAYOUT_KVM_PID, offsetof(struct kvm, userspace_pid));
	DEFINE(LAYOUT_KVM_STATS_ID, offsetof(struct kvm, stats_id));
	DEFINE(LAYOUT_KVM_VM_TYPE, offsetof(struct kvm, arch.vm_type));
	DEFINE(LAYOUT_KVM_SIZE, sizeof(struct kvm));
	DEFINE(LAYOUT_OPS_FUNC, offsetof(struct ftrace_ops, func));
	DEFINE(LAYOUT_OPS_SIZE, sizeof(struct ftrace_ops));
	DEFINE(LAYOUT_FREGS_IP, offsetof(struct __arch_ftrace_regs, regs.ip));
	DEFINE(LAYOUT_FREGS_DI, offsetof(struct __arch_ftrace_regs, regs.di));
	return 0;
}
