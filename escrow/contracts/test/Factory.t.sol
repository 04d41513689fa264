// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Base, IEscrowFactory} from "./Base.sol";
import {PlainToken} from "./mocks/Tokens.sol";
import {IJobEscrow} from "../src/IJobEscrow.sol";
import {vm} from "./Vm.sol";

contract FactoryTest is Base {
    IEscrowFactory private _factory;

    function setUp() public override {
        super.setUp();
        _factory = IEscrowFactory(create("EscrowFactory", ""));
    }

    function test_oneEscrowPerToken() public {
        address foretold = _factory.escrowOf(address(token));
        vm.assertTrue(!_factory.isEscrow(foretold), "not yet");
        vm.expectEmit(true, true, false, true, address(_factory));
        emit IEscrowFactory.EscrowDeployed(address(token), foretold);
        vm.prank(stranger);
        vm.assertEq(_factory.deploy(address(token)), foretold, "as foretold");
        vm.assertTrue(_factory.isEscrow(foretold), "now");
        vm.assertEq(IJobEscrow(foretold).token(), address(token), "its token");
        vm.assertEq(_factory.deploy(address(token)), foretold, "again: the same");
    }

    function test_anotherTokenAnotherEscrow() public {
        address other = address(new PlainToken());
        vm.assertTrue(_factory.deploy(other) != _factory.deploy(address(token)), "apart");
    }

    function test_whatItDidNotDeploy() public {
        vm.assertTrue(!_factory.isEscrow(address(escrow)), "same code, deployed by another");
        vm.expectRevert();
        _factory.deploy(stranger);
        vm.assertTrue(!_factory.isEscrow(_factory.escrowOf(stranger)), "nothing is left of it");
    }
}
