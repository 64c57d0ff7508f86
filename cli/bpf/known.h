/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the programs know of this kernel once they are loaded.
 *
 * Each is a number in the instructions: the compiler writes KNOWN_FIRST and its place in this list, and the loader
 * (cli/src/bpf/object.rs, which reads the list too) puts the value in its place.
 */

/* 1: SVM; 0: VMX. */
KNOWN(is_svm)
/* Entries of `heres`, less one. */
KNOWN(cpu_mask)
/* A power of two, less one, that no ledger's first byte exceeds. */
KNOWN(ledgers_mask)
/* Whether the kernel lets a program read by an address (bpf_rdonly_cast(), Linux 6.2), and as which type. */
KNOWN(can_cast)
KNOWN(number_type)
/* Whether tables tell what exits were about. */
KNOWN(details)
/* Whether no tracepoint tells that a vCPU is about to run a nested guest. */
KNOWN(nests_always)

/* In struct task_struct. */
KNOWN(task_on_rq)
KNOWN(task_sched_delayed)
/* In struct kvm_vcpu. */
KNOWN(vcpu_kvm)
KNOWN(vcpu_id)
KNOWN(vcpu_preempted)
KNOWN(vcpu_scheduled_out)
KNOWN(vcpu_guest_mode)
KNOWN(vcpu_blocking)
KNOWN(vcpu_poll_success)
KNOWN(vcpu_poll_fail)
/* In struct kvm. */
KNOWN(kvm_userspace_pid)
KNOWN(kvm_stats_id)
KNOWN(kvm_vm_type)
/* VMX: in struct vcpu_vmx, from its vCPU on. */
KNOWN(vmx_exit_reason)
/* SVM: in struct vcpu_svm, from its vCPU on, and in struct vmcb. */
KNOWN(svm_vmcb)
KNOWN(svm_vmcb01)
KNOWN(vmcb_exit_code)
/* For details. In struct kvm_vcpu: the guest's registers, which of them KVM has read, and kvm_run. */
KNOWN(vcpu_registers)
KNOWN(vcpu_available)
KNOWN(vcpu_run)
KNOWN(vcpu_wants_to_run)
KNOWN(vcpu_protected)
KNOWN(vcpu_hyperv)
KNOWN(vcpu_efer)
/* In struct kvm: other than 0 where the guest's hypercalls are Hyper-V's. */
KNOWN(kvm_guest_os)
/* VMX: in struct vcpu_vmx, and by which bits KVM notes that it has read them. */
KNOWN(vmx_qualification)
KNOWN(qualification_bit)
KNOWN(vmx_interruption)
KNOWN(interruption_bit)
/* SVM: in struct vmcb; the second one follows. */
KNOWN(vmcb_exit_info_1)
KNOWN(vmcb_rip)
