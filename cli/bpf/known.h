/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Facts about the running kernel that the loader puts into the programs.
 *
 * Each is a number in the instructions. The compiler writes KNOWN_FIRST plus its place in this list. The loader
 * (cli/src/bpf/object.rs, which reads the list too) replaces that by the value.
 */

/* 1 for SVM, 0 for VMX. */
KNOWN(is_svm)
/* Number of entries of `cpus` minus one. */
KNOWN(cpu_mask)
/* A power of two minus one, at least as large as the offset of every ledger. */
KNOWN(ledgers_mask)
/* True if the kernel lets a program read from an address (bpf_rdonly_cast(), Linux 6.2), and the type to use. */
KNOWN(can_cast)
KNOWN(number_type)
/* True if vCPUs have tables with the details of exits. */
KNOWN(details)
/* True if no tracepoint fires before a vCPU runs a nested guest. */
KNOWN(nests_always)

/* Offsets in struct task_struct. */
KNOWN(task_on_rq)
KNOWN(task_sched_delayed)
/* Offsets in struct kvm_vcpu. */
KNOWN(vcpu_kvm)
KNOWN(vcpu_id)
KNOWN(vcpu_preempted)
KNOWN(vcpu_scheduled_out)
KNOWN(vcpu_guest_mode)
KNOWN(vcpu_blocking)
KNOWN(vcpu_poll_success)
KNOWN(vcpu_poll_fail)
/* Offsets in struct kvm. */
KNOWN(kvm_userspace_pid)
KNOWN(kvm_stats_id)
KNOWN(kvm_vm_type)
/* VMX: offset in struct vcpu_vmx, from its vCPU. */
KNOWN(vmx_exit_reason)
/* SVM: offsets in struct vcpu_svm, from its vCPU, and in struct vmcb. */
KNOWN(svm_vmcb)
KNOWN(svm_vmcb01)
KNOWN(vmcb_exit_code)
/* For details. Offsets in struct kvm_vcpu: the guest's registers, the mask of those that KVM has read, kvm_run and more. */
KNOWN(vcpu_registers)
KNOWN(vcpu_available)
KNOWN(vcpu_run)
KNOWN(vcpu_wants_to_run)
KNOWN(vcpu_protected)
KNOWN(vcpu_hyperv)
KNOWN(vcpu_efer)
/* Offset in struct kvm of a field that is not 0 if the guest's hypercalls are Hyper-V's. */
KNOWN(kvm_guest_os)
/* VMX: offsets in struct vcpu_vmx, and the bits by which KVM notes that it has read the fields. */
KNOWN(vmx_qualification)
KNOWN(qualification_bit)
KNOWN(vmx_interruption)
KNOWN(interruption_bit)
/* SVM: offsets in struct vmcb. The second exit info follows the first. */
KNOWN(vmcb_exit_info_1)
KNOWN(vmcb_rip)
